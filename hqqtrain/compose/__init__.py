"""Compose a command line into checked configurations; the only package that imports Hydra."""
