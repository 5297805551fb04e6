"""Errors, files, locks, secrets and signals, which the front end and the back end share."""
