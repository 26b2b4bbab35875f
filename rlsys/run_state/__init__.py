"""The files of a run directory: checkpoints to resume from, ledger, JSON lines, saved rollouts."""
