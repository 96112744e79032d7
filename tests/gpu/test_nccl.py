"""NCCL's communicators on the one GPU there is: a group of one rank. What several exchange needs as many GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from nanoflow_backend.runtime.collectives.group import LOOPBACK, arrive, join_group, missing, open_store, talking_over
from nanoflow_backend.runtime.collectives.nccl import TIMEOUT, Nccl

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(120),
]


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[Nccl]:
    store = open_store(str(tmp_path / "rendezvous"), 1, TIMEOUT)
    arrive(store, 0)
    assert missing(store, 2) == [1]
    join_group(store, 0, 1, LOOPBACK)
    with talking_over(LOOPBACK):
        made = Nccl()
    yield made
    made.close()
    dist.destroy_process_group()


def test_every_collective_runs_and_is_captured_on_a_number_of_sms(alone: Nccl) -> None:
    x = torch.randn(6, 16, device="cuda")
    wide = torch.full((6, 24), torch.nan, device="cuda")
    out = wide[:, :16]  # a row is part of a wider one
    calls = [
        alone.all_reduce,
        alone.reduce_scatter_columns,
        alone.all_gather_columns,
        alone.reduce_scatter_rows,
        alone.all_gather_rows,
    ]
    for num_sms in (None, 8):
        for call in calls:
            out.fill_(torch.nan)
            call(x, out=out, num_sms=num_sms)
            assert torch.equal(out, x)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                call(x, out=out, num_sms=num_sms)
            kept = x.clone()
            x.normal_()
            graph.replay()
            assert torch.equal(out, x)
            assert not torch.equal(out, kept)
            assert wide[:, 16:].isnan().all()
            del graph
    with pytest.raises(RuntimeError, match="expected a call with num_sms 4 before one is captured"):
        capture_first(alone, x, out)


def capture_first(alone: Nccl, x: torch.Tensor, out: torch.Tensor) -> None:
    with torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode="thread_local"):
        alone.all_reduce(x, out=out, num_sms=4)


def test_an_abort_lets_the_process_go_on(alone: Nccl) -> None:
    x = torch.ones(4, 16, device="cuda")
    alone.all_reduce(x, out=torch.empty_like(x))
    alone.abort()
    torch.cuda.synchronize()
    assert x.sum() == 64
