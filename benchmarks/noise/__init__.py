"""Cost of a number of noise, by source."""
