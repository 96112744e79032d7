"""Streams of the tests must not wait for each other's kernels: each has a hardware queue of its own."""

import os

os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")  # read when the device is first used
