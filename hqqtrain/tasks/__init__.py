"""The tasks that `task=` selects: plan a model, load it, do the work and record the results."""
