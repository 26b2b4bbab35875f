"""Trains a tiny base model from scratch, for examples and tests."""
