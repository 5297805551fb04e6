"""Errors, files, locks, secrets, signals, threads: what the front end and the back end share."""
