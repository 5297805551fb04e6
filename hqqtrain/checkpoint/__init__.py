"""Training checkpoints: their format, when to save, and how to resume."""
