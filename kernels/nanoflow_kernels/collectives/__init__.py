"""This package holds the network kernels: ranks exchange and sum their rows through each other's memory."""
