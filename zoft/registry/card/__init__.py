"""A tuner card: its schema, its file, its networks, its base, and a picture of its scales."""
