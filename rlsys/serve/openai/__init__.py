"""The OpenAI-compatible API: completions of served bases and of saved sampler checkpoints."""
