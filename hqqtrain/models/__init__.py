"""Models before they have weights: name, source, architecture on the meta device, tokenizer."""
