"""The committed result files are read by the kind that their names begin with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results"


def load(name: str) -> dict[str, Any] | None:
    """The result of this name, if there is one that was measured: none of a rank that ran alone, emulated."""
    path = RESULTS / f"{name}.json"
    found = json.loads(path.read_text()) if path.exists() else {"emulated": None}
    return None if "emulated" in found else found


def load_all(kind: str, which: str = "*") -> list[dict[str, Any]]:
    """All results KIND_WHICH that were measured, by name; without those parts that lie beside a whole, as NAME.PART."""
    return [result for result in _results(f"{kind}_{which}") if "emulated" not in result]


def load_emulated(kind: str) -> list[dict[str, Any]]:
    """All results KIND_* of a rank that ran alone, by name: predictions, which stand in no row with measurements."""
    return [result for result in _results(f"{kind}_*") if "emulated" in result]


def _results(pattern: str) -> Iterator[dict[str, Any]]:
    for path in sorted(RESULTS.glob(f"{pattern}.json")):
        if "." not in path.stem:
            yield json.loads(path.read_text())


def whole_runs_of_the_search() -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """(under the search's plans, sequential): offline runs of one workload on one card, ablation_NAME_searched* and
    ablation_NAME_beside_searched."""
    for beside in load_all("ablation", "*_beside_searched"):
        for searched in load_all("ablation", "*[0-9]_searched*"):
            if searched["workload"] == beside["workload"]:
                yield searched, beside


def runs_beside_vllm() -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """(ours, vLLM's): offline runs of one workload on one card, offline_beside_vllm_NAME and peer_vllm_NAME."""
    for path in sorted(RESULTS.glob("offline_beside_vllm_*.json")):
        ours, peer = load(path.stem), load(path.stem.replace("offline_beside_vllm", "peer_vllm"))
        if ours and peer:
            yield ours, peer
