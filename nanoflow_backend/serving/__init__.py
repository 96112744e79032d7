"""The engine behind Triton Inference Server. This file imports nothing: the stub and set-up import parts of it."""
