"""How many logits exist at a time, which decides the peak memory of training and evaluation.

With a vocabulary of 128,256, 2,048 tokens have 1 GiB of logits in fp32. So the training loss and
the evaluation compute them in chunks, and the memory estimate counts one chunk.
"""

MAX_TRAINING_LOGITS = 1 << 24
"""Largest number of logits of one chunk of the training loss, about 200 MB with their gradients."""

MAX_EVALUATION_TOKENS = 2048
"""Largest number of tokens whose logits the evaluation converts to fp32 at a time."""
