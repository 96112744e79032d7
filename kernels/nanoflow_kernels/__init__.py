"""This package holds the kernels of the engine and their definition in torch (`reference`)."""
