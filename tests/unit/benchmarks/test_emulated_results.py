"""Results of a rank that ran alone stand in no row with what was measured, and each of their own says what it is."""

import json
from pathlib import Path

import pytest

from benchmarks.tables import result_files
from benchmarks.tables.full_table import groups
from benchmarks.tables.headlines import headlines
from benchmarks.tables.result_files import RESULTS, load, load_all, load_emulated

ABOUT = {
    "ranks": 8,
    "rank": 0,
    "network": "NCCL",
    "source": "a test",
    "link_pj_per_byte": [210, 430],
    "rank_skew": [0.01, 0.03],
}
ARM = {"over_sequential": [1.2, 1.19, 1.21], "over_sequential_with_links": [1.18, 1.15]}
PREDICTED = {
    "emulated": ABOUT,
    "model": "llama-3-70b",
    "workload": "1024/512",
    "gpu": "NVIDIA H200",
    "cells": [{"tokens": 4096, "arms": {"overlapped, 250 GB/s": ARM}}],
}


@pytest.fixture
def all_emulated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The committed results, as if every one of them had been emulated."""
    for path in RESULTS.glob("*.json"):
        (tmp_path / path.name).write_text(json.dumps(json.loads(path.read_text()) | {"emulated": ABOUT}))
    monkeypatch.setattr(result_files, "RESULTS", tmp_path)
    return tmp_path


def test_no_headline_and_no_measured_row_is_of_an_emulated_result(all_emulated: Path) -> None:
    assert headlines() == []
    rows = [row for group in groups().values() for row in group]
    assert len(rows) >= 5, "offline runs are shown as predictions"
    assert all(row.what.startswith("EMULATED: ") for row in rows)
    assert all("one rank alone" in row.hardware for row in rows)
    assert load("parity") is None
    assert load_all("offline") == []


def test_predictions_say_what_they_lack(all_emulated: Path) -> None:
    (all_emulated / "emulated_tp_llama3_70b.json").write_text(json.dumps(PREDICTED))
    (row,) = (row for group in groups().values() for row in group if "llama-3-70b on 8 GPUs" in row.what)
    assert row.measured == (
        "overlapped, 250 GB/s 1.200x (1.190 to 1.210; with the energy of links 1.150 to 1.180); "
        "ranks that are late by 1% to 3% of a step are not in it"
    )


def test_a_measured_result_is_no_prediction() -> None:
    assert load_all("offline")
    assert [run for run in load_emulated("offline") if "emulated" not in run] == []
