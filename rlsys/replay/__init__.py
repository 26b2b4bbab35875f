"""Recomputes a step of a run from its saved rollouts."""
