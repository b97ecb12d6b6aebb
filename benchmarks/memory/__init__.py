"""Peak memory of fine-tuning over that of inference."""
