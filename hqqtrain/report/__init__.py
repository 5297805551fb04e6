"""The report of a run, during it and after its end: plots and an HTML page, without torch."""
