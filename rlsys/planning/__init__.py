"""Checks made before a job starts: predicted memory, placement, and the model folder."""
