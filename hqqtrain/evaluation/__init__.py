"""Perplexity and KL divergence on the held-out set."""
