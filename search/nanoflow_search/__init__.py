"""nanoflow_search finds the fastest schedule of a model on a machine: it measures, plans, times and writes a file."""
