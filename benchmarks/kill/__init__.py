"""A run killed at random moments ends with the same weights as an uninterrupted one."""
