"""What a number of noise costs, by where it comes from."""
