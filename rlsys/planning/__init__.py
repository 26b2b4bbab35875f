"""What is checked before a job starts: memory, placement and the model's folder."""
