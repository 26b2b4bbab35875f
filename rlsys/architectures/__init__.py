"""What is known about a model from its config.json alone. Imports no torch."""
