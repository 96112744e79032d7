"""This benchmark compares the engine's tokens and logits with those of transformers."""
