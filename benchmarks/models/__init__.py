"""Models to measure with: the configurations of real ones, and tiny random checkpoints with tokenizers."""
