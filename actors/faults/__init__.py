"""Detects actors that died or hang, and reports the cause."""
