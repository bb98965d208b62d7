"""Logs: where they go, how they look, and what every record says of its origin."""
