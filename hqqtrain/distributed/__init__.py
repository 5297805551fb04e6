"""Ranks: how they communicate, which rows each owns, and the runtime of a process."""
