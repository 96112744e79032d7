"""engine.json, and what is said where it is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from nanoflow_backend.config.engine_config import EngineConfig
from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.config.precision import BFLOAT16, FLOAT32, Precision


def engine_json(folder: Path, **fields: Any) -> Path:
    path = folder / "engine.json"
    path.write_text(json.dumps(fields))
    return path


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    path = engine_json(tmp_path, model="../weights", schedule="plans/a.json", python="env/bin/python")
    config = EngineConfig.load(path)
    assert config.model == str(tmp_path.parent / "weights")
    assert config.schedule == str(tmp_path / "plans/a.json")
    assert config.python == str(tmp_path / "env/bin/python")
    other = EngineConfig.load(engine_json(tmp_path, model="/models/x", schedule="nano-batched-3", python="python3.11"))
    assert (other.model, other.schedule, other.python) == ("/models/x", "nano-batched-3", "python3.11")


def test_a_link_to_an_interpreter_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "python").symlink_to(sys.executable)
    config = EngineConfig.load(engine_json(tmp_path, model="m", python="./python"))
    assert config.python == str(tmp_path / "python")


def test_parameters_win_and_may_be_strings(tmp_path: Path) -> None:
    path = engine_json(tmp_path, model="m", page_tokens=64, prefix_caching=True)
    parameters = {"page_tokens": "32", "prefix_caching": "false", "chunk_tokens": "7", "model": "other"}
    config = EngineConfig.load(path, parameters)
    assert (config.page_tokens, config.prefix_caching, config.chunk_tokens) == (32, False, 7)
    assert config.model == str(tmp_path / "other")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"page_token": 4}, ["page_token"]),
        ({"page_tokens": 0}, ["page_tokens", ">= 1", "0"]),
        ({"page_tokens": "many"}, ["page_tokens", "Expected `int | null`"]),
        ({"page_tokens": 1.5}, ["page_tokens", "Expected `int | null`"]),
        ({"chunk_tokens": 0}, ["chunk_tokens", ">= 1 or null"]),
        ({"prompt_tokens": 0}, ["prompt_tokens", ">= 1 or null"]),
        ({"tensor_parallel": 3}, ["tensor_parallel", "1, 2, 4 or 8", "3"]),
        ({"dense_batch_tokens": 8, "max_running": 9}, ["max_running", "dense_batch_tokens (8)", "9"]),
        ({"max_queue_size": 0}, ["max_queue_size", ">= 1", "0"]),
        ({"queue_timeout_us": 0}, ["queue_timeout_us", ">= 1", "0"]),
        ({"priority_aging_s": -1}, ["priority_aging_s", ">= 0", "-1"]),
        ({"max_engine_restarts": -1}, ["max_engine_restarts", ">= 0", "-1"]),
        ({"priority_aging_s": "nan"}, ["priority_aging_s", "finite number"]),
        ({"dense_batch_tokens": 2**63}, ["dense_batch_tokens", "below 2147483648"]),
        ({"max_model_tokens": 1}, ["max_model_tokens", ">= 2 or null"]),
        ({"gpu_memory_utilization": 1.5}, ["gpu_memory_utilization", "(0, 1]", "1.5"]),
        ({"otlp_traces_endpoint": "collector:4317"}, ["otlp_traces_endpoint", "http(s) URL", "collector:4317"]),
        ({"load_format": "pickle"}, ["load_format", "pickle"]),
        ({"collectives": "mpi"}, ["'mpi' - at `$.collectives`: expected auto, gloo, nccl, peer"]),
        ({"quantization": "int4"}, ["'int4' - at `$.quantization`: expected fp8"]),
        ({"dtype": "int8"}, ["int8", "dtype"]),
        ({"kv_cache_dtype": "int8"}, ["int8", "kv_cache_dtype"]),
        ({"device": "tpu"}, ["tpu", "device"]),
        ({"prefix_caching": "perhaps"}, ["prefix_caching"]),
        ({"model": 3}, ["model", "Expected `str`"]),
    ],
)
def test_what_is_wrong_in_engine_json_is_named(fields: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        EngineConfig.load(engine_json(tmp_path, **{"model": "m"} | fields))
    assert all(word in str(error.value) for word in ["engine.json", *words]), str(error.value)


def test_all_faults_are_told_at_once_with_the_known_fields(tmp_path: Path) -> None:
    fields = {"model": 3, "page_token": 4, "chunk": 5, "page_tokens": 0, "gpus": ["a"], "dtype": "int8", "seed": 2**63}
    with pytest.raises(ConfigError) as error:
        EngineConfig.load(engine_json(tmp_path, **fields))
    message = str(error.value)
    assert message.startswith(f"{tmp_path / 'engine.json'}: 6 faults: Expected `str`, got `int` - at `$.model`; ")
    for words in (
        "Expected `int`, got `str` - at `$.gpus[0]`",
        "Invalid enum value 'int8' - at `$.dtype`",
        "Object contains unknown fields `page_token`, `chunk`; known are model, schedule, ",
        "page_tokens: expected an integer >= 1 or null, below 2147483648, got 0",
        "seed: expected an integer >= -9223372036854775808, below 9223372036854775808, got 9223372036854775808",
    ):
        assert words in message


def test_rules_are_told_together_with_what_fields_say_of_each_other() -> None:
    with pytest.raises(ConfigError, match=r"^max_queue_size: .*got 0; gpus: expected 1 different ids.*; max_running: "):
        EngineConfig(model="m", max_queue_size=0, gpus=(1, 1), dense_batch_tokens=8, max_running=9)


@pytest.mark.parametrize("field", ["model", "schedule", "schedule_cache", "python"])
def test_paths_that_no_file_can_have_are_refused(field: str, tmp_path: Path) -> None:
    for path in ("a\0b.json", "x" * 300 + ".json", "x/" * 2100 + ".json"):
        with pytest.raises(ConfigError, match=rf"{field}: expected a path of names up to 255 bytes"):
            EngineConfig.load(engine_json(tmp_path, **{"model": "m", field: path}))
    assert EngineConfig.load(engine_json(tmp_path, model="~nobody-of-that-name/m")).model.endswith("name/m")


def test_what_is_left_open_is_settled_by_the_device() -> None:
    config = EngineConfig(model="m")
    cpu, cuda = config.settle("cpu"), config.settle("cuda")
    assert (cpu.device, cpu.dtype, cpu.page_tokens, cpu.kv_cache_tokens) == ("cpu", "float32", 16, 65536)
    assert (cpu.dense_batch_tokens, cpu.chunk_tokens, cpu.max_running) == (512, 512, 512)
    assert (cuda.device, cuda.dtype, cuda.page_tokens, cuda.kv_cache_tokens) == ("cuda", "bfloat16", 64, None)
    assert (cuda.dense_batch_tokens, cuda.chunk_tokens, cuda.max_running) == (2048, 2048, 2048)
    assert (cpu.prompt_tokens, cuda.prompt_tokens) == (512, 2048)


def test_what_is_said_stays_said_on_every_device() -> None:
    said = {"dtype": "float16", "page_tokens": 8, "kv_cache_tokens": 99, "dense_batch_tokens": 64, "max_running": 3}
    for device in ("cpu", "cuda"):
        settled = EngineConfig(model="m", **said).settle(device)
        assert {name: getattr(settled, name) for name in said} == said
        assert settled.chunk_tokens == 64
        assert settled.settle(device) == settled


def test_one_dtype_fills_all_roles_that_are_not_named() -> None:
    config = EngineConfig(model="m")
    assert (config.settle("cpu").precision, config.settle("cuda").precision) == (FLOAT32, BFLOAT16)
    half = EngineConfig(model="m", dtype="float16").settle("cuda")
    assert half.precision == Precision(weights="float16", activations="float16", kv="float16")
    assert str(half.precision) == "float16"
    apart = EngineConfig(model="m", kv_cache_dtype="bfloat16").settle("cpu")
    assert apart.precision == Precision(weights="float32", activations="float32", kv="bfloat16")
    assert str(apart.precision) == "weights float32, activations float32, kv bfloat16"
    assert apart.settle("cpu") == apart
    assert [apart.precision.element_bytes(name) for name in ("weights", "kv", "int32", "float32")] == [4, 2, 4, 4]


def test_ranks_of_the_cpu_exchange_rows_over_gloo_and_those_of_gpus_by_what_these_can() -> None:
    config = EngineConfig(model="m", tensor_parallel=2)
    assert (config.settle("cpu").collectives, config.settle("cuda").collectives) == ("gloo", "auto")
    assert replace(config, collectives="nccl").settle("cuda").collectives == "nccl"
    with pytest.raises(ConfigError, match="collectives: expected auto, gloo or nccl on 2 hosts, got peer"):
        replace(config, collectives="peer", hosts=2, secret_file="s")


def test_what_a_device_cannot_do_is_refused() -> None:
    with pytest.raises(
        ConfigError, match="kv_cache_dtype: expected bfloat16, as dtype is, or fp8_e4m3 on cuda, got float16"
    ):
        EngineConfig(model="m", kv_cache_dtype="float16").settle("cuda")
    with pytest.raises(ConfigError, match=r"max_running: expected at most dense_batch_tokens \(512\).*got 600"):
        EngineConfig(model="m", max_running=600).settle("cpu")
    with pytest.raises(ConfigError, match="collectives: expected auto or gloo on cpu, got nccl"):
        EngineConfig(model="m", collectives="nccl").settle("cpu")
    with pytest.raises(ConfigError, match="collectives: expected auto, nccl or peer on cuda, got gloo"):
        EngineConfig(model="m", collectives="gloo").settle("cuda")


@pytest.mark.parametrize("text", [None, "{", "[1]", "{}"])
def test_an_engine_json_that_is_none(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "engine.json").write_text(text)
    with pytest.raises(ConfigError, match=r"engine\.json"):
        EngineConfig.load(tmp_path / "engine.json")


def test_configs_need_no_torch() -> None:
    modules = ("config.engine_config", "models.hugging_face", "models.model")
    imports = ", ".join(f"nanoflow_backend.{module}" for module in modules)
    code = f"import sys, {imports}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": ":".join(sys.path)}, check=True)
