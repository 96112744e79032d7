"""This package is `nanoflow bench`: workloads, offline and online runs, their results, rooflines and pictures."""
