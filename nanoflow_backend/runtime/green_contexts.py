"""Green contexts: streams whose kernels keep to SMs of their own.

What needs arithmetic and what needs bandwidth disturb each other on the same SMs; on SMs of their own, both gain.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from nanoflow_backend.schedule.plan import ScheduleError

Shares = tuple[tuple[str, int], ...]  # (lane, SMs)
GRAIN = 8  # SMs: a share that is split off is a multiple of it (H200); what is left may be anything


@cache  # For good: captured graphs and blocks of torch's allocator refer to streams after their program.
def lane_streams(shares: Shares) -> dict[str, torch.cuda.Stream]:
    """A stream of the current device, which is in use, for each lane.

    Raises:
        ScheduleError: the device cannot be split so.
        RuntimeError: a call of the driver failed, which is named with its result.
    """
    driver = import_module("cuda.bindings.driver")  # it is there where a GPU is
    device = call(driver.cuDeviceGet, torch.cuda.current_device())
    streams: dict[str, torch.cuda.Stream] = {}
    for lane, resource in split(driver, device, shares).items():
        description = call(driver.cuDevResourceGenerateDesc, [resource], 1)
        flags = driver.CUgreenCtxCreate_flags.CU_GREEN_CTX_DEFAULT_STREAM
        context = call(driver.cuGreenCtxCreate, description, device, flags)
        stream = call(driver.cuGreenCtxStreamCreate, context, driver.CUstream_flags.CU_STREAM_NON_BLOCKING, 0)
        streams[lane] = torch.cuda.ExternalStream(int(stream))
    return streams


def split(driver: ModuleType | SimpleNamespace, device: Any, shares: Shares) -> dict[str, Any]:
    """The SMs of each lane, split off one after the other. The device rounds a share up; the last one is what is left.

    Raises:
        ScheduleError: a lane would get another number of SMs than its share; it says how many.
    """
    rest = call(driver.cuDeviceGetDevResource, device, driver.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM)
    resources: dict[str, Any] = {}
    for lane, sms in sorted(shares, key=lambda share: share[1] % GRAIN > 0):
        if len(resources) == len(shares) - 1:
            granted = rest
        else:
            groups, count, rest = call(driver.cuDevSmResourceSplitByCount, 1, rest, 0, sms)
            if count != 1:
                raise ScheduleError(f"partition: lane {lane!r} cannot have {sms} SMs of what the device has left")
            granted = groups[0]
        if granted.sm.smCount != sms:
            raise ScheduleError(f"partition: lane {lane!r} has {sms} SMs, the device would grant {granted.sm.smCount}")
        resources[lane] = granted
    return resources


def call(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function of the driver returns beside its result."""
    result, *values = function(*arguments)
    if result != 0:  # CUDA_SUCCESS
        raise RuntimeError(f"{function.__name__}: {result.name}")
    return values[0] if len(values) == 1 else values
