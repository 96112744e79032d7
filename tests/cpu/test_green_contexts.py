"""How lanes get SMs of their own, on a driver that is made up. The real one: tests/gpu/test_cuda_program.py."""

from enum import IntEnum
from types import SimpleNamespace
from typing import Any

import pytest

from nanoflow_backend.runtime.green_contexts import call, split
from nanoflow_backend.schedule.plan import ScheduleError


class Result(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_NOT_SUPPORTED = 801


def sms(count: int) -> SimpleNamespace:
    return SimpleNamespace(sm=SimpleNamespace(smCount=count))


def driver(device_sms: int, grain: int = 8) -> SimpleNamespace:
    def split_by_count(groups: int, resource: Any, flags: int, least: int) -> tuple[Any, ...]:
        granted = -(-least // grain) * grain
        if granted > resource.sm.smCount:
            return Result.CUDA_SUCCESS, [], 0, resource
        return Result.CUDA_SUCCESS, [sms(granted)], 1, sms(resource.sm.smCount - granted)

    return SimpleNamespace(
        CUdevResourceType=SimpleNamespace(CU_DEV_RESOURCE_TYPE_SM=1),
        cuDeviceGetDevResource=lambda device, kind: (Result.CUDA_SUCCESS, sms(device_sms)),
        cuDevSmResourceSplitByCount=split_by_count,
    )


@pytest.mark.parametrize(
    "shares", [(("memory", 40), ("network", 8), ("compute", 84)), (("memory", 36), ("compute", 96))]
)
def test_what_can_be_split_off_is_and_another_lane_gets_what_is_left(shares: tuple[tuple[str, int], ...]) -> None:
    assert {lane: resource.sm.smCount for lane, resource in split(driver(132), 0, shares).items()} == dict(shares)


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ((("memory", 33), ("compute", 99)), "lane 'memory' has 33 SMs, the device would grant 40"),
        ((("memory", 40), ("compute", 88)), "lane 'compute' has 88 SMs, the device would grant 92"),
        ((("a", 80), ("b", 80), ("c", 4)), "lane 'b' cannot have 80 SMs of what the device has left"),
    ],
)
def test_what_the_device_does_not_grant_is_refused(shares: tuple[tuple[str, int], ...], message: str) -> None:
    with pytest.raises(ScheduleError, match=f"partition: {message}"):
        split(driver(132), 0, shares)


def test_a_failed_call_is_named() -> None:
    def cuGreenCtxCreate() -> tuple[Result, None]:
        return Result.CUDA_ERROR_NOT_SUPPORTED, None

    with pytest.raises(RuntimeError, match="cuGreenCtxCreate: CUDA_ERROR_NOT_SUPPORTED"):
        call(cuGreenCtxCreate)
