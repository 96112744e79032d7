"""This package does continuous batching in ints: who runs, which tokens, which pages. No torch here."""
