"""What config.json says about FP8: a file a format, each from its keys to a Quantization."""
