"""What rlsys runs inside vLLM's own processes, and how it starts them."""
