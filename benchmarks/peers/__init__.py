"""These benchmarks run the same work on other projects' engines and kernels."""
