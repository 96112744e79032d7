"""The simulation of conversations and the store of the disk tier: their commands write what they promise."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.engine import disk_pages, multi_round


def test_the_simulation_has_an_arm_for_each_tier_and_the_bound_of_each_part(tmp_path: Path) -> None:
    multi_round.main("lmsys-like", conversations=12, kv_cache_tokens=6400, host_gib=[1.0], output=tmp_path / "r")
    result = json.loads((tmp_path / "r").read_text())
    assert list(result["arms"]) == ["recomputing", "device", "host_1_gib", "host_1_gib_loads_only"]
    assert result["settings"]["host_tokens"]["host_1_gib"] == 8192
    for arm in result["arms"].values():
        assert arm["bound"]["prompt_tokens"] == arm["prompt_tokens"]["all"]
        assert 0 < arm["share_of_bound"] <= 1
    assert result["arms"]["host_1_gib"]["scheduler"]["tiers"]["moved_pages"]["store"] > 0


def test_the_store_is_measured_with_and_without_waiting_for_the_disk(tmp_path: Path) -> None:
    disk_pages.main(tmp_path, page_mib=0.01, pages=8, threads=2, files=20, output=tmp_path / "r")
    result = json.loads((tmp_path / "r").read_text())
    assert [(run["threads"], run["sync"]) for run in result["runs"]] == [(1, False), (1, True), (2, False), (2, True)]
    assert all(run["write_gb_per_s"] > 0 and run["read_gb_per_s"] > 0 for run in result["runs"])
    assert result["settings"]["page_bytes"] == 8192
    assert result["small_files"]["files"] == 20
    assert [path.name for path in tmp_path.iterdir()] == ["r"]
