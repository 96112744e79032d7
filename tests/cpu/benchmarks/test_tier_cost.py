"""What tiers cost is measured in turns: the same load on both engines, pages stored by one, ratios of pairs."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import typer

from benchmarks.engine import tier_cost

SETTINGS = ["device=cpu", "page_tokens=8", "kv_cache_tokens=640", "max_model_tokens=64", "max_running=8"]


def test_both_engines_are_full_and_one_of_them_stores_every_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tier_cost, "SETTLE_S", 0.05)
    monkeypatch.setattr(tier_cost, "LEAST_WINDOW_S", 0.05)
    output, folder = tmp_path / "r", tmp_path / "pages"
    tier_cost.main(
        Path("demo/tiny-llama"),
        host_gib=0.01,
        disk=folder,
        disk_gib=0.01,
        workload="24/8",
        pairs=2,
        window_s=0.4,
        limit_s=math.inf,
        setting=SETTINGS,
        output=output,
    )
    found = json.loads(output.read_text())
    windows = found["windows"]
    assert [window["arm"] for window in windows] == ["without", "tiers", "tiers", "without"]
    assert all((window["stored_gb_per_s"] > 0) == (window["arm"] == "tiers") for window in windows)
    assert all(window["seconds"] == pytest.approx(0.4, abs=0.3) and window["tokens"] > 0 for window in windows)
    low, high = sorted(windows[i]["tokens_per_s"] / windows[j]["tokens_per_s"] for i, j in ((1, 0), (2, 3)))
    mean, least, most = found["with_tiers_over_without"]["tokens_per_s"]
    assert mean == pytest.approx(math.sqrt(low * high), rel=1e-3)
    assert least <= low * 1.001 < high * 0.999 <= most or low == pytest.approx(high, rel=0.01)
    assert found["tiers"]["moved_pages"]["write"] > 0 == found["tiers"]["moved_pages"]["load"]
    assert found["settings"]["max_running"] == 8
    assert list(folder.glob("*.page"))


def test_what_leaves_no_time_for_windows_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(typer.BadParameter, match=r"expected 2 s for each of 4 windows, -?[0-9.]+ s are left"):
        tier_cost.main(
            Path("demo/tiny-llama"), 0.01, None, 1.0, "24/8", pairs=2, window_s=60, limit_s=3.0, setting=SETTINGS
        )
    with pytest.raises(typer.BadParameter, match="expected PROMPT/OUTPUT such as 1024/512, got 24"):
        tier_cost.main(Path("demo/tiny-llama"), workload="24", setting=SETTINGS)


@pytest.mark.parametrize(("gib", "named"), [(0.0, "0"), (-1.0, "-1"), (math.nan, "nan"), (math.inf, "inf")])
def test_tiers_have_some_memory(gib: float, named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tier_cost, "make_engine", None)
    for sizes in ({"host_gib": gib}, {"disk": Path("pages"), "disk_gib": gib}):
        with pytest.raises(typer.BadParameter, match=f"expected a finite number above 0, got {named}$"):
            tier_cost.main(Path("demo/tiny-llama"), **sizes)
