"""This package holds the schedule as data: ordered launches, their file, and the built-in plans."""
