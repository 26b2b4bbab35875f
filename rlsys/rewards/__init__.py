"""Grades completions: decodes them, runs the graders and adds up the reward terms."""
