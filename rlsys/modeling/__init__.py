"""The forward and backward pass of the model that is trained: attention, LoRA, log-probabilities."""
