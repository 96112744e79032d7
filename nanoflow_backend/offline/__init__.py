"""Offline work: a file of jobs to a file of results, whatever engine runs them.."""
