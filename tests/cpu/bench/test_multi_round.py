"""`nanoflow bench multi-round` on a real engine: a tiny model whose device holds two conversations, and host memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from support.commands.command_line import run_here


def measured(output: Path, *settings: str, cost: tuple[str, ...] = ()) -> dict[str, Any]:
    sizes = ("--conversations", "8", "--active", "4", "--scale", "0.1", "--seed", "1")
    device = ("kv_cache_tokens=192", "page_tokens=8", "max_model_tokens=128", *settings)
    options = [word for setting in device for word in ("--set", setting)]
    done = run_here("bench", "multi-round", "--model", "demo/tiny-llama", *sizes, *cost, "--output", output, *options)
    assert done.returncode == 0, done.stderr
    assert "of host memory" in done.stdout
    return json.loads(output.read_text())


def test_host_memory_saves_prompt_tokens_that_the_device_forgot(tmp_path: Path) -> None:
    without = measured(tmp_path / "without.json", "prefix_caching=false")
    host = measured(tmp_path / "host.json", "host_kv_cache_bytes=67108864", cost=("--step-cost", "0.001,0.1,0.1"))
    assert without["prompt_tokens"]["all"] == without["prompt_tokens"]["computed"]
    assert without["cached_share"] == 0
    assert without["rounds"] == host["rounds"] > 8
    tokens = host["prompt_tokens"]
    assert tokens["all"] == without["prompt_tokens"]["all"] == sum(n for tier, n in tokens.items() if tier != "all")
    assert tokens["host"] > 0
    assert tokens["computed"] < 0.8 * tokens["all"]
    assert host["scheduler"]["tiers"]["moved_pages"]["load"] > 0
    assert host["mean_context_tokens"] > 20
    assert host["bound"]["prompt_tokens"] == tokens["all"] > host["bound"]["new_prompt_tokens"] > 0
    assert 0 < host["share_of_bound"] < 1
    assert "bound" not in without
    assert host["settings"]["host_kv_cache_bytes"] == 67108864
    for result in (without, host):
        assert result["rounds_per_s"] > 0
        assert result["first_token_ms"]["returning_rounds"]["p99"] > 0


def test_a_limit_in_which_no_round_ends_is_named(tmp_path: Path) -> None:
    options = ("--scale", "0.02", "--limit-s", "0", "--set", "max_model_tokens=64")
    done = run_here("bench", "multi-round", "--model", "demo/tiny-llama", *options, "--output", tmp_path / "r")
    assert done.returncode != 0
    assert "--limit-s: expected more than the 0 s in which no round has ended" in done.stderr
