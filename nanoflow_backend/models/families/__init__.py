"""One file per model family: what its config.json means, and its op graphs."""
