"""Evaluates a policy on held-out problems, with confidence intervals."""
