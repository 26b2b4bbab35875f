"""Trains LoRA adapters: packing, losses, optimizer, checkpoints."""
