"""Processes that run untrusted code, with limits on its resources."""
