"""The size of a kernel's grid, which depends on shapes and granted SMs and never on data."""

from __future__ import annotations

from functools import cache

import torch

INTERPRETED_SMS = 3  # of the interpreter's "device": few, and not a divisor of what the tests launch


def programs(work: int, num_sms: int | None, device: torch.device, *, per_sm: int) -> int:
    """Count the programs of a launch: `per_sm` for each granted SM, and no more than there are pieces of `work`.

    num_sms: SMs that this launch may fill; None, or more than the device has: all of them.

    Raises:
        ValueError: num_sms is not positive.
    """
    return min(work, per_sm * granted_sms(num_sms, device))


def granted_sms(num_sms: int | None, device: torch.device) -> int:
    """Count the SMs that a launch gets which may fill `num_sms`, as of `programs`.

    Raises:
        ValueError: num_sms is not positive.
    """
    if num_sms is not None and num_sms < 1:
        raise ValueError(f"num_sms: expected a positive number, got {num_sms}")
    sms = device_sms(device)
    return sms if num_sms is None else min(num_sms, sms)


@cache
def device_sms(device: torch.device) -> int:
    """Streaming multiprocessors (SMs) of a CUDA device; of the CPU, those that the interpreter pretends to have."""
    if device.type == "cpu":
        return INTERPRETED_SMS
    return torch.cuda.get_device_properties(device).multi_processor_count
