"""These benchmarks measure what the engine does on the CPU: its thread, its scheduler, its admission of requests."""
