"""Tables of what was measured are written from the result files: one in full, and seven rows for the README."""
