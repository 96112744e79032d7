"""This room makes what a search gives away: trials, the schedule file, tables, pictures, progress."""
