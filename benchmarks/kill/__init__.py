"""A run killed at random moments ends in the weights of a run that never was."""
