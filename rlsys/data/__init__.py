"""Reads problems from the rows of data sets, deduplicates them and orders them into batches."""
