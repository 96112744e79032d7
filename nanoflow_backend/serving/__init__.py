"""This package puts the engine behind Triton Inference Server. This file imports nothing: set-up reads parts of it."""
