"""Copies of pages between a GPU and pinned host memory, by kernel and by copy engines; and an engine with tiers."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from support.kernels.page_copies import SHAPES, bits_of, check_round_trip, random_pages, wait

from benchmarks.models import checkpoints
from nanoflow_backend.engine import LLM, SamplingParams
from nanoflow_backend.kvcache.host_pool import SLICE_BYTES, HostPool
from nanoflow_backend.runtime.page_copies import PAGES_A_LAUNCH, CudaPageCopies, How
from nanoflow_backend.scheduler.tiers.rates import Rates

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
HOWS = get_args(How)
EIGHT_MIB = (32, 64, 2, 8, 64, 128)  # Llama-3-8B's pages, 64 of them
OPTIONS = {"page_tokens": 16, "dense_batch_tokens": 64, "max_running": 4}
TIERS = {"kv_cache_tokens": 320, "host_kv_cache_bytes": 2**26}


def pinned(pool: HostPool) -> HostPool:
    deadline_s = time.monotonic() + 30
    while pool.ready < pool.num_slots:
        assert time.monotonic() < deadline_s, f"{pool.ready} of {pool.num_slots} slots were pinned"
        time.sleep(1e-3)
    return pool


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_pages_come_back_bit_by_bit(shape: tuple[int, ...], dtype: torch.dtype, how: How) -> None:
    kv = random_pages(shape, dtype, "cuda")
    pool = pinned(HostPool(kv, 9))
    check_round_trip(CudaPageCopies(kv, pool, how), kv, pool)
    pool.close()


@pytest.mark.parametrize("how", HOWS)
def test_copies_keep_up_with_what_a_step_fills(how: How) -> None:
    """3.7 GB/s is what 28,000 tokens a second of Llama-3-8B fill; the link takes 50, of which half will do here."""
    kv = random_pages(EIGHT_MIB, torch.bfloat16, "cuda")
    pool = pinned(HostPool(kv, 64))
    copies = CudaPageCopies(kv, pool, how)
    pages = list(range(64))
    before = bits_of(kv)
    for to_host in (True, False):
        wait(copies.begin(pages, pages, to_host=to_host))
        begun_s = time.perf_counter()
        copy = copies.begin(pages, pages, to_host=to_host)
        issued_s = time.perf_counter() - begun_s
        rate = 64 * kv.page_bytes / wait(copy)
        print(f"{how}, {'to' if to_host else 'from'} host: {rate / 1e9:.1f} GB/s, {1e3 * issued_s:.2f} ms to issue")
        assert rate > 25e9
        assert issued_s < 0.02
    assert torch.equal(bits_of(kv), before)
    pool.close()


@pytest.mark.parametrize("how", HOWS)
def test_a_copy_begins_after_the_event_and_not_before(how: How) -> None:
    kv = random_pages((4, 8, 2, 2, 16, 64), torch.bfloat16, "cuda")
    pool = pinned(HostPool(kv, 4))
    copies = CudaPageCopies(kv, pool, how)
    wait(copies.begin([0], [0], to_host=True))
    torch.cuda._sleep(400_000_000)  # 0.2 s: the step that fills the page
    kv.tensor[:, 3] = 7.0
    ended = torch.cuda.Event()
    ended.record()
    copy = copies.begin([3], [2], to_host=True, after=ended)
    assert copy.seconds() is None
    wait(copy)
    assert (pool.payload(2).view(torch.bfloat16) == 7.0).all()
    pool.close()


def test_memory_is_pinned_slice_by_slice_and_given_back() -> None:
    kv = random_pages((2, 2, 2, 8, 64, 128), torch.bfloat16, "cuda")
    slots = 3 * SLICE_BYTES // kv.page_bytes + 1
    for _ in range(2):  # the second finds no memory that is pinned already
        pool = pinned(HostPool(kv, slots))
        assert len(pool._pinned) == 4
        pool.close()
        assert not pool._pinned
    closed = HostPool(kv, 1000)
    closed.close()  # while it is being pinned
    assert closed.ready == 0


def played(llm: LLM) -> list[list[int]]:
    """The answers of eight conversations of three rounds, one after the other: each batch is the same in any engine."""
    rng = random.Random(1)
    said = [[rng.randrange(256) for _ in range(rng.randint(40, 120))] for _ in range(8)]
    answers = []
    for _ in range(3):
        for conversation in said:
            (completion,) = llm.generate([conversation], SamplingParams(max_tokens=16, temperature=0, ignore_eos=True))
            while llm.engine.has_work:  # its pages are stored
                llm.engine.step()
            answers.append(completion.token_ids)
            conversation += completion.token_ids + [rng.randrange(256) for _ in range(6)]
    llm.engine.scheduler.check()
    assert llm.engine.scheduler.stats.used_pages == 0
    return answers


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize(
    "fields", [{}, {"kv_cache_dtype": "fp8_e4m3"}, {"dtype": "float32"}, {"cuda_graphs": False}], ids=str
)
@pytest.mark.parametrize("architecture", checkpoints.OWN_GRAPHS)
def test_greedy_tokens_are_those_without_tiers(
    architecture: str, fields: dict[str, Any], how: How, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoints.save(checkpoints.make(architecture, head_dim=64), tmp_path / "model")
    ample = LLM.from_pretrained(folder, device="cuda", **OPTIONS, kv_cache_tokens=65536, **fields)
    expected = played(ample)
    monkeypatch.setattr(CudaPageCopies.__init__, "__defaults__", (how, PAGES_A_LAUNCH))
    monkeypatch.setattr(Rates, "pages_to_compute", lambda self, *_: 0)  # whatever was found is loaded
    tiered = LLM.from_pretrained(folder, device="cuda", **OPTIONS, **TIERS, **fields)
    pinned(tiered.engine.executor.worker.transfers.pool)
    tiered.engine.scheduler._lower.host.grow(tiered.engine.executor.worker.transfers.pool.num_slots)
    assert played(tiered) == expected
    stats = tiered.engine.scheduler.stats
    assert stats.prefix_hit_tokens == ample.engine.scheduler.stats.prefix_hit_tokens
    assert min(stats.tiers.moved_pages["store"], stats.tiers.moved_pages["load"]) > 30
    tiered.engine.close()
