"""Predictions say how long any schedule takes, and at what clock and power, from a profile alone."""
