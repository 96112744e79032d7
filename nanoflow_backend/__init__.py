"""This package is NanoFlow for Triton Inference Server: graph, schedule, runtime, scheduler, engine and serving.

This file imports nothing: half of the package must stay importable without torch.
"""
