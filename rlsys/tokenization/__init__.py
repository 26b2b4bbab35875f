"""From messages to token ids and back: chat templates, control tokens, stop conditions."""
