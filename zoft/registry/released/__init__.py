"""The tuners that the authors of ZO Fine-tuner released: read without running their pickles, converted to cards."""
