"""These runs look for what breaks or leaks: fuzz, soak, overload, reloads, random traffic."""
