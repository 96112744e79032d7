"""This package holds the network kernels: what they compute (`protocol.py`) and how the ranks exchange their rows."""
