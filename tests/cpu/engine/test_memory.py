"""What does not fit is refused before it is allocated, with numbers that are right."""

import re
from pathlib import Path

import pytest

from benchmarks.models import checkpoints
from nanoflow_backend.config.engine_config import EngineConfig
from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.config.precision import BFLOAT16, FLOAT32, Precision
from nanoflow_backend.engine import Engine, program_builder
from nanoflow_backend.engine.memory import check_host_room, check_room
from nanoflow_backend.models import weights
from nanoflow_backend.models.hugging_face import read_model_config
from nanoflow_backend.models.model import build
from nanoflow_backend.runtime.host_memory import available_bytes

MIB = 2**20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.save(checkpoints.make("mixtral"), tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("precision", [FLOAT32, BFLOAT16], ids=str)
def test_the_size_of_the_weights_is_what_loading_allocates(folder: Path, precision: Precision) -> None:
    config = read_model_config(folder)
    model = build(config)
    loaded = weights.load(folder, config, model, precision=precision)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in loaded.values()}
    assert weights.size_bytes(model, precision) == sum(storages.values())


def test_what_is_proposed_fits_and_a_page_more_does_not(folder: Path) -> None:
    model = read_model_config(folder)

    def check(kv_cache_tokens: int) -> None:
        config = EngineConfig(model="m", kv_cache_tokens=kv_cache_tokens, page_tokens=16).settle("cpu")
        check_room(config, model, 3 * MIB, 10 * MIB, "cpu")

    with pytest.raises(ConfigError, match=r"beside weights of 0\.00 GiB, but 0\.01 GiB .* expected at most") as refused:
        check(10**6)
    most = int(re.findall(r"\d+", str(refused.value))[-1])
    check(most)
    with pytest.raises(ConfigError, match="kv_cache_tokens"):
        check(most + 1)
    page_bytes = model.num_layers * 2 * model.num_kv_heads * model.head_dim * 16 * 4
    assert most == 7 * MIB // page_bytes * 16


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_each_host_gives_an_equal_part_of_the_memory_below_the_device(hosts: int) -> None:
    def slots(asked: int) -> int:
        group = {"tensor_parallel": 4, "hosts": hosts, **({"secret_file": "s"} if hosts > 1 else {})}
        config = EngineConfig(model="m", host_kv_cache_bytes=asked, **group).settle("cpu")
        return check_host_room(config, MIB, free_bytes=100 * MIB)

    most = 100 * MIB * hosts
    assert slots(0) == 0
    assert slots(most) == 25 * hosts
    with pytest.raises(
        ConfigError, match=rf"^host_kv_cache_bytes: .*0\.10 GiB of .* expected at most {most}$"
    ) as refused:
        slots(most + 1)
    assert (f"on each of {hosts} hosts" in str(refused.value)) == (hosts > 1)


def test_weights_that_do_not_fit_are_not_even_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program_builder.Device, "free_bytes", lambda *_: 10_000)
    monkeypatch.setattr(program_builder.weights, "load", lambda *_, **__: 1 // 0)
    with pytest.raises(
        ConfigError, match=r"model: its weights take 0\.\d\d GiB in float32 on each of 1 ranks, but 0\.00 "
    ):
        Engine.from_pretrained(folder)


def test_a_step_whose_hidden_states_do_not_fit_is_refused_before_anything_is_loaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program_builder.weights, "load", lambda *_, **__: 1 // 0)
    with pytest.raises(ConfigError, match="dense_batch_tokens: the hidden states of 2000000000 tokens alone"):
        Engine.from_pretrained(folder, dense_batch_tokens=2 * 10**9)


MEMINFO = "MemTotal: 1000 kB\nMemFree: 10 kB\nMemAvailable: 600 kB\n"


@pytest.mark.parametrize(
    ("files", "available"),
    [
        ({}, 600 * 1024),
        ({"memory.max": "max\n", "memory.current": "5\n", "memory.stat": "inactive_file 1\n"}, 600 * 1024),
        ({"memory.max": "9000\n", "memory.current": "5000\n", "memory.stat": "anon 7\ninactive_file 1000\n"}, 5000),
        ({"memory.max": "9000\n", "memory.current": "9500\n", "memory.stat": "inactive_file 0\n"}, 0),
        (
            {
                "memory/memory.limit_in_bytes": "8000",
                "memory/memory.usage_in_bytes": "5000",
                "memory/memory.stat": "total_inactive_file 500",
            },
            3500,
        ),
    ],
)
def test_memory_is_the_machines_or_what_the_container_leaves(
    tmp_path: Path, files: dict[str, str], available: int
) -> None:
    (tmp_path / "meminfo").write_text(MEMINFO)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert available_bytes(tmp_path, tmp_path) == available
