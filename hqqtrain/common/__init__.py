"""Ground floor: errors, files, locks, secrets and signals, with the standard library alone."""
