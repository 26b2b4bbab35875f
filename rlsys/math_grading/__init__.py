"""Tells whether a mathematical answer is correct: compares it with the reference by the rules of docs/grading.md."""
