"""Continuous batching: many requests at once on one model, each joining and leaving at any step."""
