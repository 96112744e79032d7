"""The engine in a process of its own: its parent, its messages, and what restarts it when it dies."""
