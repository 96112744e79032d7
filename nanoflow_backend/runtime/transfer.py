"""to_device and to_host copy between host and device without anybody waiting for the copy.

Pinned blocks come from torch's allocator, which gives none away before the copies that use it are over: whoever packs
the next step while the last one is still being copied gets another block.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def to_device(values: np.ndarray, device: torch.device) -> Tensor:
    """The values [...], of the same dtype, on the device, in the order of its stream."""
    host = torch.from_numpy(values)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


def to_host(tensor: Tensor) -> Tensor:
    """The tensor [...] on the host, of the same dtype, to be read once the device's stream has come here."""
    return tensor.to("cpu", non_blocking=True)
