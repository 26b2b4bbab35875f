"""Converts messages to token ids: chat templates, control tokens and stop conditions."""
