"""Samples completions with vLLM."""
