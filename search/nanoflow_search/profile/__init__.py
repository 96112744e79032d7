"""A profile holds measured loads: this room says which are measured, how, and what lies between the points."""
