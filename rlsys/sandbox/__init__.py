"""Processes that run code of others, with limits on what the code may use."""
