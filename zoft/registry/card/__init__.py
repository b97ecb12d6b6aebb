"""A tuner card: its schema, its file, the networks in it, its page and picture."""
