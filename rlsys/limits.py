"""Numeric limits that a job's configuration and the types of the client share. Imports nothing."""

LEAST_EPS = 1e-38  # of AdamW in float32: eps 0 would give 0/0 for a weight whose gradients were all 0
