"""Models as they are published: families, checkpoints, tokenizers, calibration text."""
