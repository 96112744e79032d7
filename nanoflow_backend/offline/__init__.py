"""This package turns a file of jobs into a file of results, whatever engine runs them."""
