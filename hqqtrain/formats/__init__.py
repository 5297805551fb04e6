"""Formats on disk, written by all ranks: packed and dense weights, adapters."""
