"""How lanes get SMs of their own, on a driver that is made up. The real one: tests/gpu/test_cuda_program.py."""

from enum import IntEnum
from types import SimpleNamespace
from typing import Any

import pytest

from nanoflow_backend.runtime.green_contexts import IGNORE_SM_COSCHEDULING, call, split
from nanoflow_backend.schedule.plan import ScheduleError


class Result(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_NOT_SUPPORTED = 801


def driver(device_sms: int, piece_sms: int = 2) -> SimpleNamespace:
    """Of a device whose SMs have numbers: each piece is a list of them."""

    def piece(numbers: range) -> SimpleNamespace:
        return SimpleNamespace(sm=SimpleNamespace(smCount=len(numbers)), numbers=numbers)

    def split_by_count(most: int, resource: Any, flags: int, least: int) -> tuple[Any, ...]:
        assert flags == IGNORE_SM_COSCHEDULING
        size = -(-least // piece_sms) * piece_sms
        count, numbers = min(most, resource.sm.smCount // size), resource.numbers
        pieces = [piece(numbers[i * size : (i + 1) * size]) for i in range(count)]
        return Result.CUDA_SUCCESS, pieces + [piece(range(0))] * (most - count), count, piece(numbers[count * size :])

    return SimpleNamespace(
        CUdevResourceType=SimpleNamespace(CU_DEV_RESOURCE_TYPE_SM=1),
        cuDeviceGetDevResource=lambda device, kind: (Result.CUDA_SUCCESS, piece(range(device_sms))),
        cuDevSmResourceSplitByCount=split_by_count,
    )


@pytest.mark.parametrize(
    ("device_sms", "piece_sms", "shares"),
    [
        (132, 2, (("memory", 40), ("network", 8), ("compute", 84))),
        (132, 2, (("memory", 34), ("compute", 98))),
        (132, 8, (("memory", 36), ("compute", 96))),  # 4 are left over when all pieces are cut
        (7, 2, (("compute", 4), ("memory", 3))),
    ],
)
def test_every_lane_has_neighbours_and_all_lanes_the_device(
    device_sms: int, piece_sms: int, shares: tuple[tuple[str, int], ...]
) -> None:
    given = {
        lane: [number for piece in pieces for number in piece.numbers]
        for lane, pieces in split(driver(device_sms, piece_sms), 0, shares).items()
    }
    assert {lane: len(numbers) for lane, numbers in given.items()} == dict(shares)
    assert all(numbers == list(range(numbers[0], numbers[-1] + 1)) for numbers in given.values())
    assert sorted(number for numbers in given.values() for number in numbers) == list(range(device_sms))
    assert given["compute"][0] == 0


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ((("memory", 33), ("compute", 99)), "lane 'compute' has 99 SMs, the device would grant 100"),
        ((("memory", 40), ("compute", 88)), "lane 'memory' has 40 SMs, the device would grant 44"),
        ((("a", 80), ("b", 80), ("c", 4)), "lane 'b' has 80 SMs, the device would grant 52"),
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
