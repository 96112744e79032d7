"""The engine with a disk below host memory: a conversation goes on after a restart, and nothing foreign is believed."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from support.waiting import until

from benchmarks.models import checkpoints
from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.engine import LLM, Engine, SamplingParams
from nanoflow_backend.engine import engine as engine_module
from nanoflow_backend.kvcache.content_hash import extend_hashes
from nanoflow_backend.kvcache.disk.page_file import PageLayout
from nanoflow_backend.request.request import Request

OPTIONS = {"device": "cpu", "page_tokens": 4, "dense_batch_tokens": 32, "max_running": 4, "kv_cache_tokens": 512}
PROMPT = [(7 * i * i + 3 * i) % 331 for i in range(83)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.save(checkpoints.make("llama"), tmp_path_factory.mktemp("model"))


@pytest.fixture
def started(tmp_path: Path) -> Callable[..., Engine]:
    def start(folder: Path, **options: Any) -> Engine:
        """An engine that has looked at what the disk holds."""
        disk = {"path": str(tmp_path / "pages"), "bytes": 2**24}
        settings = {**OPTIONS, "host_kv_cache_bytes": 2**22, "disk_kv_cache": disk} | options
        engine = Engine.from_pretrained(folder, **settings)
        own = engine.executor.worker.page_store
        own._folder.scan()  # as its own thread does, some time
        for rank in range(1, engine.config.tensor_parallel):  # and those of other ranks
            on_disk = engine.executor._ranks._reports._on_disk[rank]
            names = pages_of(replace(own._layout, rank=rank), tmp_path)
            until(lambda on_disk=on_disk, names=names: len(on_disk) == len(names))
        return engine

    return start


def pages_of(layout: PageLayout, folder: Path) -> list[Path]:
    return sorted((folder / "pages").glob(f"{layout.digest.hex()[:16]}-*.page"))


def contents(tokens: list[int]) -> list[bytes]:
    """Of the full pages that begin with these tokens."""
    hashes: list[bytes] = []
    extend_hashes(hashes, array("i", tokens), len(tokens) // 4, 4)
    return hashes


def answer(engine: Engine, prompt: list[int] = PROMPT) -> tuple[list[int], int]:
    """Eight greedy tokens, and how many of the prompt came from the disk. The engine ends."""
    engine.add(Request(0, prompt, SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)))
    tokens: list[int] = []
    disk_tokens = 0
    while engine.has_work:
        for delta in engine.step():
            tokens += delta.token_ids
            disk_tokens = delta.account.disk_tokens if delta.account else 0
    engine.scheduler.check()
    engine.close()
    return tokens, disk_tokens


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_prompt_is_not_computed_again_after_a_restart(
    model: Path, started: Callable[..., Engine], ranks: int
) -> None:
    tokens, disk_tokens = answer(started(model, tensor_parallel=ranks))
    assert disk_tokens == 0
    assert answer(started(model, tensor_parallel=ranks)) == (tokens, 80)
    if ranks == 1:
        assert answer(started(model), [*PROMPT, *tokens, 5])[1] == 88, "nor is the answer"


def test_a_page_is_there_if_every_rank_has_it_and_computed_and_written_again_if_one_has_not(
    model: Path, started: Callable[..., Engine], tmp_path: Path
) -> None:
    """Rank 1 has lost one page, and another one is not whole."""
    engine = started(model, tensor_parallel=2)
    layout = engine.executor.worker.page_store._layout
    tokens, _ = answer(engine)
    files = {path.name.split("-")[1]: path for path in pages_of(replace(layout, rank=1), tmp_path)}
    tenth, fifteenth = (files[contents(PROMPT)[index].hex()] for index in (10, 15))
    fifteenth.unlink()
    whole = tenth.read_bytes()
    tenth.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    engine = started(model, tensor_parallel=2)
    assert engine.executor.worker.page_store.lookup(contents(PROMPT)[15]), "rank 0 has its part"
    assert answer(engine) == (tokens, 40)
    tiers = engine.scheduler.stats.tiers
    assert (tiers.moved_pages["read"], tiers.failed_pages["read"]) == (14, 1), "what one lacks is not asked for"
    assert tiers.disk.refused_files == {"checksum": 1}, "rank 1 has told"
    assert answer(started(model, tensor_parallel=2)) == (tokens, 80)


@pytest.mark.parametrize("change", ["other weights", "other dtype", "other page size", "quantised"])
def test_pages_of_anything_else_are_not_found(
    change: str, model: Path, started: Callable[..., Engine], tmp_path: Path
) -> None:
    answer(started(model))
    other = checkpoints.save(checkpoints.make("llama", seed=1), tmp_path / "other")
    folder, fields = {
        "other weights": (other, {}),
        "other dtype": (model, {"kv_cache_dtype": "bfloat16"}),
        "other page size": (model, {"page_tokens": 8}),
        "quantised": (model, {"quantization": "fp8"}),
    }[change]
    assert answer(started(folder, **fields))[1] == 0


def test_a_file_that_is_not_whole_costs_its_tokens_and_changes_none(
    model: Path, started: Callable[..., Engine], tmp_path: Path
) -> None:
    tokens, _ = answer(started(model))
    files = sorted((tmp_path / "pages").glob("*.page"))
    for path in files:
        damaged = bytearray(path.read_bytes())
        damaged[5000] ^= 1
        path.write_bytes(damaged)
    engine = started(model)
    assert answer(engine) == (tokens, 0)
    assert engine.scheduler.stats.tiers.failed_pages["read"] > 0


def test_a_folder_that_cannot_be_is_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    fields = {"host_kv_cache_bytes": 2**22, "disk_kv_cache": {"path": str(tmp_path / "file"), "bytes": 2**24}}
    with pytest.raises(ConfigError, match=r"disk_kv_cache.path: .*file: expected a folder"):
        Engine.from_pretrained(model, **OPTIONS | fields)


class StuckDisk:
    """DiskMoves that begin and never end."""

    def write(self, *_: object) -> bool:
        return True

    def poll(self) -> list[tuple[int, bool]]:
        return []

    def close(self) -> bool:
        return True


def test_when_generate_returns_its_pages_are_on_the_disk(
    model: Path, started: Callable[..., Engine], tmp_path: Path
) -> None:
    llm = LLM(started(model))
    greedy = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    llm.generate([PROMPT], greedy)
    assert len(list((tmp_path / "pages").glob("*.page"))) == 22, "a script may end without closing anything"
    assert not llm.engine.has_work
    for number, _ in llm.stream([(PROMPT[::-1], greedy)]):  # its caller gives up after the first token
        assert number == 0
        break
    assert not llm.engine.has_work
    assert len(list((tmp_path / "pages").glob("*.page"))) == 22 + 21, "and of its last step"
    assert llm.engine.scheduler.stats.tiers.dropped_pages["closed"] == 0
    llm.close()


def test_a_disk_that_is_stuck_does_not_hold_up_the_end_and_what_is_lost_is_counted(
    model: Path, started: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = started(model)
    engine.executor.worker.transfers._disk.close()
    engine.executor.worker.transfers._disk = StuckDisk()
    engine.add(Request(0, PROMPT, SamplingParams(max_tokens=50, temperature=0.0, ignore_eos=True)))
    engine.step()
    engine.step()
    engine.step()
    assert engine.drain(0.01) is False
    assert engine.scheduler.live_ids == [0], "it only waits"
    monkeypatch.setattr(engine_module, "DRAIN_S", 0.1)
    engine.close()
    assert engine.scheduler.live_ids == []
    tiers = engine.scheduler.stats.tiers
    assert 0 < tiers.dropped_pages["closed"] == tiers.moved_pages["store"], "all were to be written"
    assert f"{tiers.moved_pages['store']} pages had not come to host memory or the disk" in caplog.text
