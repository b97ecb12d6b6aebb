"""The Hugging Face Hub: pulling and pushing cards, their page, and what it publishes about models."""
