"""Time and peak memory of meta-training over first-order Adam fine-tuning."""
