"""Conversations that come back: how long they are, what their prompts have in common, and rounds a second."""
