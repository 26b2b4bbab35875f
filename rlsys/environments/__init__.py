"""Samples multi-turn completions, and runs a task's environment in a pool of processes."""
