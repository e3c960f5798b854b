"""Trains jumps on a frozen model, from as much text as there is."""
