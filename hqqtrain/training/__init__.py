"""The training loop, its engines, optimizers and losses."""
