"""Perplexity, KL divergence and continuations of the held-out set."""
