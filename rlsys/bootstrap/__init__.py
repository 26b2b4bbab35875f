"""Trains a tiny base model and its tokenizer from scratch, for examples and tests."""
