"""The tasks that `task=` selects. Each plans and loads a model, uses it and records results."""
