"""Extensions that run inside vLLM's worker processes."""
