"""Find, load, identify and save a model from the Hub, a folder or a GGUF file."""
