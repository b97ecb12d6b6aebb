"""What a model is trained on: prompts, choices, data, batches and metrics."""
