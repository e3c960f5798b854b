"""Latency, memory and peers: how fast the exits are, and against what. See README.md."""
