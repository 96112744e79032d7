"""One engine on two hosts, with real ranks and host memory below: the tokens of one rank, and a link that goes without
a word."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

from benchmarks.hosts.group import Group
from benchmarks.hosts.leader import TOKENS
from benchmarks.hosts.namespaces import two_hosts
from nanoflow_backend.engine import LLM, SamplingParams


@pytest.mark.timeout(120)
def test_two_hosts_give_the_tokens_of_one_rank_and_notice_a_lost_link(
    model: Path, prompts: list[list[int]], tmp_path: Path
) -> None:
    """The device has room for a fraction of the prompts: what comes again is loaded on both hosts, or nothing is."""
    settings = {"kv_cache_tokens": 256, "dense_batch_tokens": 64}
    tiers = {"host_kv_cache_bytes": 2**24}
    copy = tmp_path / "copy"
    shutil.copytree(model, copy)
    with two_hosts() as hosts, Group(tmp_path, model, copy, hosts, **settings, **tiers) as group:
        group.join()
        llm = LLM.from_pretrained(model, **settings)
        greedy = SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True)
        expected = [completion.token_ids for completion in llm.generate(prompts, greedy)]
        llm.close()
        group.wait_for("ready")
        assert group.complete(prompts) == expected
        assert group.complete(prompts) == expected
        assert group.loaded_tokens > 100
        group.cut()
        cut_s = time.monotonic()
        how = group.wait_for("death")["how"]
        assert time.monotonic() - cut_s < 10
        assert f"host 1 ({hosts.addresses[1]}, rank 1): nothing comes for 5 s: the host or the network is gone" in how
