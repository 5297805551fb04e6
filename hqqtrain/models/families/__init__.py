"""Architectures: where the parts of a model are, and what they are called in each family."""
