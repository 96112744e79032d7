"""This package holds the KV cache: who owns which page (ints), and the tensors that the pages are in."""
