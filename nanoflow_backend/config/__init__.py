"""This package holds what a model and an engine are told to be: read once at the edge, strict and frozen."""
