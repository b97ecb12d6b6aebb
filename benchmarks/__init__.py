"""Measured claims, each repeatable by one command: ``python -m benchmarks.<name>``."""
