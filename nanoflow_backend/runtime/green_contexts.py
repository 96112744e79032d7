"""Green contexts give a lane a stream whose kernels keep to SMs of their own.

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
PIECE_SMS = 2  # of the pieces that a device is cut into, and shares are made of
IGNORE_SM_COSCHEDULING = 1  # of the driver's flags: pieces as small as that; large thread-block clusters are given up


@cache  # For good: captured graphs and blocks of torch's allocator refer to streams after their program.
def lane_streams(shares: Shares) -> dict[str, torch.cuda.Stream]:
    """A stream of the current device, which is in use, for each lane.

    Raises:
        ScheduleError: the device cannot be split so.
        RuntimeError: a call of the driver failed, which is named with its result.
    """
    return streams_of(import_module("cuda.bindings.driver"), split, shares)  # it is there where a GPU is


def streams_of(
    driver: ModuleType, cut: Callable[[Any, Any, Shares], dict[str, list[Any]]], shares: Shares
) -> dict[str, torch.cuda.Stream]:
    """A stream for each lane, on the SMs that `cut` gives it."""
    device = call(driver.cuDeviceGet, torch.cuda.current_device())
    streams: dict[str, torch.cuda.Stream] = {}
    for lane, pieces in cut(driver, device, shares).items():
        description = call(driver.cuDevResourceGenerateDesc, pieces, len(pieces))
        flags = driver.CUgreenCtxCreate_flags.CU_GREEN_CTX_DEFAULT_STREAM
        context = call(driver.cuGreenCtxCreate, description, device, flags)
        stream = call(driver.cuGreenCtxStreamCreate, context, driver.CUstream_flags.CU_STREAM_NON_BLOCKING, 0)
        streams[lane] = torch.cuda.ExternalStream(int(stream))
    return streams


def split(driver: ModuleType | SimpleNamespace, device: Any, shares: Shares) -> dict[str, list[Any]]:
    """The pieces of the device that each lane gets, neighbours by their numbers, and together all of it.

    Neighbours lie in different GPCs, so that every lane has its part of each one's way to memory. On an H200 decode
    attention alone reads up to 15 % more so than on SMs that fill whole GPCs, and beside products both are up to 5 and
    8 % faster (32 to 40 SMs; at 28 there is no difference: benchmarks/results/partition_placement_h200.json). The first
    numbers are the irregular ones: the largest lane has them.

    Raises:
        ScheduleError: a lane would get another number of SMs than its share; it says how many.
    """
    whole = call(driver.cuDeviceGetDevResource, device, driver.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM)
    most = whole.sm.smCount // PIECE_SMS
    found, count, rest = call(driver.cuDevSmResourceSplitByCount, most, whole, IGNORE_SM_COSCHEDULING, PIECE_SMS)
    left = [*found[:count], rest] if rest.sm.smCount else list(found[:count])
    pieces: dict[str, list[Any]] = {}
    for lane, sms in sorted(shares, key=lambda share: -share[1]):
        pieces[lane], granted = [], 0
        while left and (granted < sms or len(pieces) == len(shares)):
            pieces[lane].append(left.pop(0))
            granted += pieces[lane][-1].sm.smCount
        if granted != sms:
            raise ScheduleError(f"partition: lane {lane!r} has {sms} SMs, the device would grant {granted}")
    return pieces


def call(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function of the driver returns beside its result.

    Raises: RuntimeError, with the driver's name of the error.
    """
    result, *values = function(*arguments)
    if result != 0:  # CUDA_SUCCESS
        raise RuntimeError(f"{function.__name__}: {result.name}")
    return values[0] if len(values) == 1 else values
