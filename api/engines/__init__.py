"""The engines that are up, and which of them takes a request."""
