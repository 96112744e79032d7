"""This package runs the real Triton Inference Server of the `nvidia-pytriton` wheel, for demos, tests and laptops."""
