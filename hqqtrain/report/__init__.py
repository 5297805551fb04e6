"""The report of a finished run: plots and an HTML page, without torch."""
