"""Recomputes a training step from its saved rollouts and a checkpoint (`rlsys replay`)."""
