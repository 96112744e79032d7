"""Gloo: what it asks of its process group. What two of its ranks compute: tests/cpu/runtime/test_tensor_parallel.py."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from nanoflow_backend.runtime.collectives.gloo import Gloo


def test_without_a_group_of_gloo_there_are_no_collectives() -> None:
    with pytest.raises(RuntimeError, match="expected a process group of the gloo backend, got None"):
        Gloo()


def test_a_group_of_one_is_a_group(tmp_path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    try:
        one = Gloo()
        assert (one.ranks, one.rank, one.capturable) == (1, 0, False)
    finally:
        dist.destroy_process_group()
