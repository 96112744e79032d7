"""This package is the command line: one file for each command, and the settings that they share."""
