"""Compares a mathematical answer with the reference answer by the rules of docs/grading.md."""
