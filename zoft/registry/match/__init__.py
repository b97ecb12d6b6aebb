"""Which card fits which model: matching, ranking, searching, and loading the card's networks."""
