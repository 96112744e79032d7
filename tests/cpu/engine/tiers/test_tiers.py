"""The engine with host memory below a tiny device: the same tokens as without, and nothing computed twice."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from support.models.fp8_checkpoints import FOLDER

from benchmarks.models import checkpoints
from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.engine import LLM, Engine, SamplingParams
from nanoflow_backend.request.request import Request
from nanoflow_backend.scheduler.account import Account
from nanoflow_backend.scheduler.tiers.rates import Rates

OPTIONS = {"device": "cpu", "page_tokens": 4, "dense_batch_tokens": 32, "max_running": 4}
TINY = {"kv_cache_tokens": 160}  # of the device: three conversations of the five do not fit
TIERS = {**TINY, "host_kv_cache_bytes": 2**24}
ROUNDS, OUTPUT_TOKENS = 3, 8
VOCABULARY = 131  # of the smallest model


def played(llm: LLM, **sampling: Any) -> list[list[int]]:
    """The answers of five conversations of three rounds, each with all that was said before as its prompt."""
    rng = random.Random(1)
    said = [[rng.randrange(VOCABULARY) for _ in range(rng.randint(20, 45))] for _ in range(5)]
    params = SamplingParams(**{"max_tokens": OUTPUT_TOKENS, "temperature": 0, "ignore_eos": True} | sampling)
    answers = []
    for _ in range(ROUNDS):
        completions = llm.generate(said, params)
        answers += [completion.token_ids for completion in completions]
        for conversation, completion in zip(said, completions, strict=True):
            conversation += completion.token_ids + [rng.randrange(VOCABULARY) for _ in range(6)]
    while llm.engine.has_work:  # pages are stored when the answers are there
        llm.engine.step()
    llm.engine.scheduler.check()
    stats = llm.engine.scheduler.stats
    assert (stats.used_pages, stats.running_requests) == (0, 0)
    return answers


def compare(folder: Path, **options: Any) -> LLM:
    """Play with tiers below a tiny device, and on a large one without; return the former."""
    ample = LLM.from_pretrained(folder, **OPTIONS, **options)
    tiered = LLM.from_pretrained(folder, **OPTIONS | TIERS | options)
    assert played(tiered) == played(ample)
    moved = tiered.engine.scheduler.stats.tiers.moved_pages
    assert moved["store"] > 60
    assert moved["load"] > 60
    ours, theirs = tiered.engine.scheduler.stats, ample.engine.scheduler.stats
    assert ours.prefix_query_tokens == theirs.prefix_query_tokens
    assert ours.prefix_hit_tokens >= 0.8 * theirs.prefix_hit_tokens > 0, "hardly anything was computed twice"
    return tiered


@pytest.mark.parametrize("architecture", checkpoints.CONFIGS)
def test_greedy_tokens_are_those_without_tiers(architecture: str, tmp_path: Path) -> None:
    compare(checkpoints.save(checkpoints.make(architecture), tmp_path / "model"))


@pytest.mark.parametrize("name", ["ct_tensor_static_kv", "modelopt_kv"])
def test_pages_in_fp8_keep_their_bits(name: str) -> None:
    """Their scales are a layer's, and stay where they are."""
    tiered = compare(FOLDER / name)
    kv = tiered.engine.executor.worker.program.binding.kv
    assert str(kv.dtype) == "torch.float8_e4m3fn"
    assert tiered.engine.executor.worker.transfers.pool.payload_bytes == kv.page_bytes


def test_pages_that_are_quantised_as_they_are_filled_keep_their_bits(tmp_path: Path) -> None:
    compare(checkpoints.save(checkpoints.make("llama"), tmp_path / "model"), kv_cache_dtype="fp8_e4m3")


def test_each_rank_keeps_its_own_heads(tmp_path: Path) -> None:
    folder = checkpoints.save(checkpoints.make("llama"), tmp_path / "model")
    expected = played(LLM.from_pretrained(folder, **OPTIONS))
    tiered = LLM.from_pretrained(folder, **OPTIONS, **TIERS, tensor_parallel=2)
    try:
        assert played(tiered) == expected
        stats = tiered.engine.scheduler.stats.tiers
        assert min(stats.moved_pages["store"], stats.moved_pages["load"]) > 60
        page_bytes = tiered.engine.executor.worker.program.binding.kv.page_bytes
        assert stats.host_pages == TIERS["host_kv_cache_bytes"] // (2 * 4096 * -(-page_bytes // 4096))
    finally:
        tiered.engine.close()


@pytest.mark.parametrize("async_scheduling", [True, False])
def test_computing_from_the_front_until_both_meet_changes_no_token(
    async_scheduling: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Rates, "pages_to_compute", lambda self, pages, *_: pages // 2)  # as if both took as long
    folder = checkpoints.save(checkpoints.make("llama"), tmp_path / "model")
    expected = played(LLM.from_pretrained(folder, **OPTIONS))
    tiered = LLM.from_pretrained(folder, **OPTIONS, **TIERS, async_scheduling=async_scheduling)
    assert played(tiered) == expected
    stats = tiered.engine.scheduler.stats
    assert stats.tiers.moved_pages["load"] > 20
    assert 0 < stats.prefix_hit_tokens < 0.8 * stats.prefix_query_tokens


def test_preempted_requests_come_back_with_their_tokens(tmp_path: Path) -> None:
    folder = checkpoints.save(checkpoints.make("llama"), tmp_path / "model")
    hot = {"temperature": 1.0, "seed": 3, "max_tokens": 40}
    expected = played(LLM.from_pretrained(folder, **OPTIONS), **hot)
    tiered = LLM.from_pretrained(folder, **OPTIONS | TIERS | {"kv_cache_tokens": 240})
    tiered.generate([[1, 2, 3]] * 8, SamplingParams(max_tokens=2))  # it learns to expect short outputs
    assert played(tiered, **hot) == expected
    assert tiered.engine.scheduler.stats.preemptions > 0


def test_a_host_that_holds_few_pages_gives_the_same_tokens(tmp_path: Path) -> None:
    folder = checkpoints.save(checkpoints.make("llama"), tmp_path / "model")
    expected = played(LLM.from_pretrained(folder, **OPTIONS))
    for keep in ("all", "seen_twice"):
        few = {"host_kv_cache_bytes": 30 * 4096, "host_kv_cache_keep": keep, "host_kv_cache_step_bytes": 3 * 4096}
        tiered = LLM.from_pretrained(folder, **OPTIONS | TIERS | few)
        assert played(tiered) == expected
        stats = tiered.engine.scheduler.stats.tiers
        assert 0 < stats.host_used_pages <= stats.host_pages <= 30
        assert sum(stats.dropped_pages.values()) + stats.evicted_pages > 0


def test_an_account_says_from_which_tier_tokens_came(tmp_path: Path) -> None:
    engine = Engine.from_pretrained(checkpoints.save(checkpoints.make("llama"), tmp_path / "model"), **OPTIONS, **TIERS)
    prompt = [*range(1, 42)]
    assert account(engine, 0, prompt)[1:] == (0, 0, 0)
    assert account(engine, 1, prompt)[1:] == (40, 0, 0)
    account(engine, 2, [*range(50, 207)])  # needs every page
    assert account(engine, 3, prompt)[1:] == (40, 40, 0)
    assert engine.scheduler.observer.observed.load_time_s.total > 0


def account(engine: Engine, id: int, prompt: list[int]) -> tuple[Account, int, int, int]:
    """Of a request of one token: what it took, and its tokens that were cached, of host memory, and of the disk."""
    engine.add(Request(id, prompt, SamplingParams(max_tokens=1)))
    deltas = []
    while engine.has_work:
        deltas += engine.step()
    (delta,) = deltas
    assert delta.account is not None
    return delta.account, delta.cached_tokens, delta.account.host_tokens, delta.account.disk_tokens


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"host_kv_cache_bytes": 100},
            r"host_kv_cache_bytes: expected 0, or at least the \d+ bytes of a page of 4 tok",
        ),
        ({"host_kv_cache_bytes": 2**50}, r"host_kv_cache_bytes: 1048576.00 GiB, but .* free: expected at most \d+"),
        ({"host_kv_cache_bytes": -1}, r"host_kv_cache_bytes: expected an integer >= 0"),
        (
            {"host_kv_cache_bytes": 2**24, "prefix_caching": False},
            r"expected 0 without prefix_caching, .* got 16777216",
        ),
        ({"host_kv_cache_keep": "some"}, "host_kv_cache_keep"),
        ({"host_kv_cache_step_bytes": 0}, r"host_kv_cache_step_bytes: expected an integer >= 1 or null"),
        ({"disk_kv_cache": {"path": "d", "bytes": 2**20}}, r"disk_kv_cache: expected host_kv_cache_bytes above 0"),
    ],
)
def test_what_cannot_be_is_refused_before_work_begins(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = checkpoints.save(checkpoints.make("llama"), tmp_path / "model")
    with pytest.raises(ConfigError, match=message):
        Engine.from_pretrained(folder, **OPTIONS | fields)
