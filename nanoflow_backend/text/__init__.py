"""This package turns text to token ids and back: tokenizer, chat templates, streaming, stop strings."""
