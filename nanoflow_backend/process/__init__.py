"""This package runs the engine in a process of its own: child processes, the messages to them, and their restart."""
