"""Data-parallel learner ranks."""
