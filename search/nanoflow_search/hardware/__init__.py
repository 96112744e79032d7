"""This room measures: on a GPU, or on a synthetic device in its place. No other room of the search touches torch."""
