"""Metrics of a run: files, wandb, TensorBoard, the progress display, and warnings about runs that cannot learn."""
