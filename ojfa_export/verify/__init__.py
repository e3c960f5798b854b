"""Comparing a bundle with independent references."""
