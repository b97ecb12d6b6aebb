"""Fuzz cards, their headers, journals and pickled tuners: a reader returns a value or raises a `ZoftError`."""
