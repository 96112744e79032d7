"""The kernels of the engine and their torch reference (`reference.py`)."""
