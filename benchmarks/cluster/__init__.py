"""Batches on a Ray cluster, whose nodes are all on this machine."""
