"""The inference engine: one base model, every tenant's adapters, one batch."""
