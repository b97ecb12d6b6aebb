"""Seeded noise: the noise table, the direction of a probe, stochastic rounding, and GPU kernels for all three."""
