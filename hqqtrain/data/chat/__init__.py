"""Chats: templates, the spans of a rendered chat that are trained, and their tokens."""
