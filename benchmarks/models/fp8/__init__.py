"""Tiny checkpoints in FP8, made by the tools of their formats."""
