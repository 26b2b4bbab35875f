"""Reward terms, answer verifiers, and the process pool that runs graders with a time limit."""
