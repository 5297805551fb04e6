"""Generate text with a model: encode prompts and chats, choose tokens, and stream them."""
