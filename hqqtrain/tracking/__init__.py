"""Trackers of metrics: metrics.jsonl, W&B, TensorBoard and the console, without torch."""
