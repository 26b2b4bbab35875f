"""Derives a model's shape, precision and support from its config.json alone. Imports no torch."""
