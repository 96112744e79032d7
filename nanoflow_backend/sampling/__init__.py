"""From logits to token ids: sampling, penalties, masks of grammars and bad words, and scores of prompts."""
