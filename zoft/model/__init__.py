"""Find, load, identify and save a model, in whatever form it is published."""
