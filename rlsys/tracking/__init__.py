"""Metrics of a run: files, wandb, TensorBoard, the progress display, and warnings drawn from them."""
