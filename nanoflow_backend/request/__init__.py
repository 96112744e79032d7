"""This package holds what a client asks for: request, sampling parameters, structured outputs, and their errors."""
