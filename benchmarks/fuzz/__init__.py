"""Mutations of cards, journals and pickled tuners: whatever comes, a reader gives a value or a `ZoftError`."""
