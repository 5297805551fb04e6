"""Turn the texts of `data.source` and `eval.source` into batches of tokens."""
