"""Forward and backward pass of the trained model: attention, LoRA, log-probabilities."""
