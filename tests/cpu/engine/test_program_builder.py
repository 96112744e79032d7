"""The three steps to a program, each on its own; how many pages fit is measured on a device of simulated memory."""

from dataclasses import dataclass

import pytest
import torch
from msgspec.structs import replace
from support.places import DEMO_MODEL

from nanoflow_backend.config.engine_config import EngineConfig
from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.config.settled import Settled
from nanoflow_backend.engine.program_builder import ProgramBuilder
from nanoflow_backend.engine.settle import settle
from nanoflow_backend.engine.worker import Worker
from nanoflow_backend.kvcache.kv_pages import page_bytes
from nanoflow_backend.kvcache.tier import Move, Transfer
from nanoflow_backend.models import weights
from nanoflow_backend.runtime.cpu import CpuProgram
from nanoflow_backend.runtime.device import Device
from nanoflow_backend.scheduler.batch import Batch

WORKSPACE_BYTES = 100_000_000


@pytest.fixture
def settled() -> Settled:
    return settle(EngineConfig(model=str(DEMO_MODEL), device="cpu", dense_batch_tokens=32))


@dataclass(frozen=True)
class SimulatedDevice(Device):
    """A CPU of so much memory, of which the largest batch takes a part as soon as it has run once."""

    total_bytes: int = 0

    def free_bytes(self, utilization: float = 1.0) -> int:
        return int(utilization * self.total_bytes) - (WORKSPACE_BYTES if RUN else 0)


RUN: list[int] = []  # pages of the programs that ran a batch for a trial


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    RUN.clear()
    monkeypatch.setattr(CpuProgram, "fill", lambda self, _: RUN.append(self.binding.kv.num_pages))
    return RUN


def builder(settled: Settled, total_bytes: int) -> ProgramBuilder:
    measured = Settled(replace(settled.config, kv_cache_tokens=None), settled.model_config)
    return ProgramBuilder(measured, SimulatedDevice("cpu", "simulated", None, total_bytes))


def test_pages_fill_what_weights_and_workspace_leave(settled: Settled, trials: list[int]) -> None:
    made = builder(settled, 10**9)
    loaded = made.load_weights()
    pages = made.size_kv_cache(loaded, torch.zeros(4, 4, dtype=torch.int32))
    assert trials == [1], "one program, of one page, ran the largest batch"
    bytes_a_page = page_bytes(settled.model_config, settled.config.page_tokens, torch.float32)
    left = 10**9 * settled.config.gpu_memory_utilization - WORKSPACE_BYTES
    assert pages * bytes_a_page <= left < (pages + 1) * bytes_a_page


def test_no_room_for_a_page_is_refused_with_the_setting_to_change(settled: Settled, trials: list[int]) -> None:
    made = builder(settled, WORKSPACE_BYTES)
    with pytest.raises(
        ConfigError, match=r"gpu_memory_utilization: 92% of the memory of simulated, .* dense_batch_tok"
    ):
        made.size_kv_cache(made.load_weights(), torch.zeros(4, 4, dtype=torch.int32))


def test_a_given_size_is_rounded_up_to_pages_and_tries_nothing(settled: Settled, trials: list[int]) -> None:
    given = Settled(replace(settled.config, kv_cache_tokens=33), settled.model_config)
    program, page_table, pages = ProgramBuilder(given, Device("cpu", "cpu", None)).build()
    assert (page_table.shape, pages, trials) == ((32, 3), 3, [])
    assert isinstance(program, CpuProgram)
    assert program.binding.kv.num_pages == 3


def test_the_page_table_is_no_longer_than_the_kv_cache_can_be(settled: Settled) -> None:
    """A model of 2^40 positions: no machine has room for a table of them all."""
    endless = Settled(settled.config, replace(settled.model_config, max_model_tokens=2**40))
    configured = ProgramBuilder(endless, Device("cpu", "cpu", None))
    assert configured.make_page_table().shape == (32, 65536 // settled.config.page_tokens)
    measured = builder(endless, 10**8)
    bytes_a_page = page_bytes(settled.model_config, settled.config.page_tokens, torch.float32)
    assert measured.make_page_table().shape == (32, (10**8 - measured.weights_bytes) // bytes_a_page)
    assert builder(settled, 10**9).make_page_table().shape == (32, -(-settled.max_model_tokens // 16))


def test_no_more_pages_are_taken_than_the_page_table_has_place_for(settled: Settled, trials: list[int]) -> None:
    """Another process of the GPU ends between the two measurements."""
    made = builder(settled, 2 * WORKSPACE_BYTES)
    made.free_bytes = made.weights_bytes + 5 * made.bytes_a_page
    table = made.make_page_table()
    assert (made.size_kv_cache(made.load_weights(), table), table.shape[1]) == (5, 5)


def test_weights_are_the_checkpoints_or_of_its_shape_alone(settled: Settled, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = ProgramBuilder(settled, Device("cpu", "cpu", None)).load_weights()
    monkeypatch.setattr(weights, "load", lambda *_, **__: 1 // 0)
    dummy = Settled(replace(settled.config, load_format="dummy"), settled.model_config)
    made = ProgramBuilder(dummy, Device("cpu", "cpu", None)).load_weights()
    assert {name: t.shape for name, t in made.items()} == {name: t.shape for name, t in loaded.items()}


def test_a_worker_without_a_tier_below_the_device_refuses_to_move_pages(settled: Settled) -> None:
    given = Settled(replace(settled.config, kv_cache_tokens=33), settled.model_config)
    batch = Batch(1, [], [], [], [], [], [Transfer(1, Move.LOAD, 2, 0)])
    with pytest.raises(ValueError, match="transfers: expected none, as there is no tier below the device, got"):
        Worker(given).launch_forward(batch)
