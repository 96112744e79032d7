"""The real Triton Inference Server from the `nvidia-pytriton` package, for demos, tests and laptops."""
