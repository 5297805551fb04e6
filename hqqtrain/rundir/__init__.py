"""The directory of a run: its paths, its lock, its identity and its JSON files, without torch."""
