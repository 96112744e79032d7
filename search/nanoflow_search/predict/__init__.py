"""Predictions from a profile: how long any schedule takes, and at what clock and power."""
