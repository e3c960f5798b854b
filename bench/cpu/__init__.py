"""Decoding on the CPU, raced against peers."""
