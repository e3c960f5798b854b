"""Replays logged requests through a bundle and compares them with its calibration."""
