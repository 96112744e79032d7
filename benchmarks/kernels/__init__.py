"""These benchmarks time single kernels on a GPU, with their power and energy."""
