"""Evaluates a policy on held-out problems."""
