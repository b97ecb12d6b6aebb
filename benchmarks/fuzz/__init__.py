"""Fuzz cards, journals and pickled tuners: a reader returns a value or raises a `ZoftError`."""
