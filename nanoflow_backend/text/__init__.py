"""Text and token ids: the tokenizer, chat templates, and the streaming of token ids back into text."""
