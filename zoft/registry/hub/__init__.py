"""Cards on the Hugging Face Hub: pull, push and search."""
