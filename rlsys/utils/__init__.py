"""Files, paths, environment variables and imports: helpers that know nothing of reinforcement learning."""
