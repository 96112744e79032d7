"""Planning states a layer as a problem, solves it with two mixed-integer programs, and keeps the best candidates."""
