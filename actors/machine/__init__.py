"""This machine and its GPUs, and what `rlsys doctor` finds wrong with them. No Ray here."""
