"""This package makes token ids of logits: sampling, penalties, masks of grammars and bad words, scores of prompts."""
