"""The benchmark of the collectives: the bytes that it counts, and the cases that it measures. It runs on a GPU only."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.kernels import collectives
from benchmarks.kernels.collectives import NAMES, Measured, moved_bytes, points
from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.runtime.collectives.protocol import rank_rows
from nanoflow_backend.runtime.device import Device


def rows_touched(kernel: str, ranks: int, tokens: int) -> int:
    """Reads and writes of rows, one by one, as the kernels' phases make them."""
    touched = 0
    for rank, row in product(range(ranks), range(tokens)):
        owns = row in rank_rows(tokens, rank, ranks)
        if kernel == "all_reduce_one_shot":
            touched += 1 + (ranks - 1)  # read, written to each peer
            touched += ranks + 1  # every rank's is read, the sum written
            continue
        if kernel != "all_gather_rows":
            touched += 0 if owns else 2  # read, written to its owner
            touched += ranks if owns else 0  # every rank's is read
        else:
            touched += 1 if owns else 0
        touched += 1 if owns else 0  # the output, or the rows that the rank keeps
        if kernel == "fused":
            touched += 2 if owns else 0  # the residual, and the normed row among all
        if kernel != "reduce_scatter_rows":
            touched += 1 if owns else 2  # put where peers read it; read there, written
    return touched


@pytest.mark.parametrize("kernel", NAMES)
def test_bytes_are_those_of_every_row_that_is_read_or_written(kernel: str) -> None:
    for ranks, tokens in product((1, 2, 3, 8), (0, 1, 7, 24)):
        assert moved_bytes(kernel, ranks, tokens, 10) == 10 * rows_touched(kernel, ranks, tokens)


def test_ranks_fit_on_the_device_and_large_messages_come_first() -> None:
    all_points = list(points(132))
    assert all(point.ranks * point.sms <= 132 for point in all_points)
    assert {point.kernel for point in all_points} == set(NAMES)
    assert [point.tokens for point in all_points] == sorted((point.tokens for point in all_points), reverse=True)


def test_what_does_not_begin_in_time_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr(collectives, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(collectives, "find_device", lambda _: Device("cuda", "a GPU", 132))
    monkeypatch.setattr(collectives, "device_sms", lambda _: 132)
    monkeypatch.setattr(collectives, "group_of", lambda ranks: range(ranks))
    monkeypatch.setattr(
        collectives, "measure", lambda point, group: Measured(point.kernel, len(group), point.sms, 1, 1, 1, 1, 1, 1)
    )
    collectives.main(output=tmp_path / "result.json", limit_s=5)
    written = json.loads((tmp_path / "result.json").read_text())
    assert {"command", "date", "versions"} < set(written)
    assert written["device"] == "a GPU"
    assert len(written["results"]) == 5
    assert len(written["results"]) + len(written["left_out"]) == len(list(points(132)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="torch sees no CUDA device"):
        collectives.main(output=tmp_path / "result.json")


def test_a_result_that_could_not_be_written_is_not_measured(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none/r.json: No such file or directory"):
        collectives.main(tmp_path / "none" / "r.json")
