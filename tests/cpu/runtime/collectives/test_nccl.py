"""Nccl, as far as it runs without GPUs: which communicator a call goes to. That of these tests is gloo's."""

from __future__ import annotations

import os
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.collectives.checks import check_collectives

from nanoflow_backend.runtime.collectives import nccl
from nanoflow_backend.runtime.collectives.nccl import Nccl


@pytest.fixture
def made(tmp_path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The `num_sms` of the communicators that were made; the one rank of a group."""
    asked: list[int | None] = []
    new_group = dist.new_group

    def over_gloo(**options: Any) -> dist.ProcessGroup:
        assert os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "0"
        assert (options.pop("backend"), options.pop("device_id").type) == ("nccl", "cuda")
        asked.append(options.pop("pg_options").config.max_ctas)
        return new_group(backend="gloo", **options)

    monkeypatch.setattr(dist, "new_group", over_gloo)
    fresh = SimpleNamespace(Options=lambda: SimpleNamespace(config=SimpleNamespace(min_ctas=None, max_ctas=None)))
    monkeypatch.setattr(dist, "ProcessGroupNCCL", fresh, raising=False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    yield asked
    dist.destroy_process_group()


def test_each_number_of_sms_has_a_communicator_that_is_made_once_and_never_in_a_capture(
    made: list[int | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = Nccl()
    assert (one.ranks, one.rank, one.capturable, made) == (1, 0, True, [None])
    for num_sms in (8, None, 16, 8):
        check_collectives(one, 3, torch.float32, num_sms)
    assert made == [None, 8, 16]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    check_collectives(one, 3, torch.float32, 16)
    with pytest.raises(RuntimeError, match="expected a call with num_sms 4 before one is captured"):
        check_collectives(one, 3, torch.float32, 4)


def test_abort_waits_for_none_of_them_and_close_lets_all_go(
    made: list[int | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, aborted = Nccl(), threading.Semaphore(0)
    check_collectives(one, 1, torch.float32, 8)
    stuck = threading.Event()
    monkeypatch.setattr(dist.ProcessGroup, "abort", lambda group: (aborted.release(), stuck.wait(10)))
    one.abort()
    assert all(aborted.acquire(timeout=10) for _ in made)
    stuck.set()
    closed: list[object] = []
    monkeypatch.setattr(nccl, "_abort_process_group", closed.append)
    one.close()
    one.close()
    assert len(closed) == len(made)
