"""From `data.source` and `eval.source` to batches of tokens."""
