"""What a search gives away: trials, the schedule file, tables, pictures and progress."""
