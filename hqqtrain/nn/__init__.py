"""Modules: the packed linear layer, its LoRA wrapper, and what replaces `nn.Linear` by them."""
