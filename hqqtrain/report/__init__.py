"""The report of a run, also while it goes on: plots and an HTML page, without torch."""
