"""Decoding, prefill and kernels on an NVIDIA GPU."""
