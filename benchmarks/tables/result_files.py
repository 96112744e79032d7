"""The committed result files are read by the kind that their names begin with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results"


def load(name: str) -> dict[str, Any] | None:
    """The result of this name, if there is one."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def load_all(kind: str, which: str = "*") -> list[dict[str, Any]]:
    """All results KIND_WHICH, by name; without those parts that lie beside a whole, as NAME.PART."""
    paths = sorted(RESULTS.glob(f"{kind}_{which}.json"))
    return [json.loads(path.read_text()) for path in paths if "." not in path.stem]


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
        if peer := load(path.stem.replace("offline_beside_vllm", "peer_vllm")):
            yield json.loads(path.read_text()), peer
