"""These benchmarks measure what tritonserver adds to the engine."""
