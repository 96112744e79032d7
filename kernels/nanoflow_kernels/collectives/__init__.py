"""This package holds the network kernels: ranks that reach each other's memory by address exchange and sum their rows."""
