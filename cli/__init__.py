"""The command line of the service: a client of its HTTP API, by the official openai client."""
