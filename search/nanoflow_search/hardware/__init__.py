"""What a search measures on: a GPU, or a synthetic device in its place. Only this room touches torch."""
