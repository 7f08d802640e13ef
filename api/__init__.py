"""The HTTP service: OpenAI's fine-tuning and inference surface over the database. No torch here."""
