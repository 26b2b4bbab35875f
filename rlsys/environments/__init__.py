"""Multi-turn completions, and the processes in which a task's environment replies."""
