"""Processes forked from a server that has torch and vLLM imported, in place of processes that import them again."""
