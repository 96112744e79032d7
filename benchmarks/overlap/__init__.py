"""These benchmarks time steady batches under plans that overlap operations, against sequential ones."""
