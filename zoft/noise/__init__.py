"""Seeded noise: tables, the direction of a probe, stochastic rounding, and GPU kernels for all three."""
