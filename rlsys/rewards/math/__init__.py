"""Compares a mathematical answer with the reference; docs/grading.md has the rules."""
