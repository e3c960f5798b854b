"""Shortcuts: calibrated, fitted in closed form, chosen by measurement, and compared."""
