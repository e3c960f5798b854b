"""Measuring a bundle on the machine it runs on: latency, traffic, the chain's own overhead."""
