"""The processes that work: Celery's trainer and sweeper, and the inference engine."""
