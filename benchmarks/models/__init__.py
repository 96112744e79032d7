"""Models to measure with lie here: configurations of real ones, and makers of tiny random checkpoints."""
