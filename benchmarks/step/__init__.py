"""Time of a zeroth-order step over its two bare forward passes."""
