"""What a result says of the command that made it, and of the engine."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from support.models import shapes

from nanoflow_backend.bench import result
from nanoflow_backend.config.engine_config import EngineConfig
from nanoflow_backend.config.quantization import AT_LOAD


@pytest.mark.parametrize(
    ("words", "command"),
    [
        (["/usr/bin/nanoflow", "bench", "offline"], "nanoflow bench offline"),
        (["/src/nanoflow_backend/__main__.py", "bench", "offline"], "nanoflow bench offline"),
        (["/src/benchmarks/__main__.py", "soak", "--output=/tmp/a.json"], "python -m benchmarks soak --output=a.json"),
        (["/src/benchmarks/__main__.py", "kernels", "--only", "a b"], "python -m benchmarks kernels --only 'a b'"),
        (["nanoflow", "--set", 'disk={"path": "/mnt/a/b", "n": 1}'], """nanoflow --set 'disk={"path": "b", "n": 1}'"""),
    ],
)
def test_the_command_can_be_run_again_and_names_no_folder(monkeypatch, words, command):
    monkeypatch.setattr("sys.argv", words)
    assert result.header()["command"] == command


def facts_of(quantization, kv_cache_dtype):
    config = EngineConfig(model="/models/m", kv_cache_dtype=kv_cache_dtype).settle("cpu")
    model = shapes.config("llama", quantization=quantization)
    return result.engine_facts(SimpleNamespace(config=config, model_config=model, description="an engine"))


def test_settings_name_no_folder():
    disk = {"path": "/mnt/secret/pages", "bytes": 7}
    config = EngineConfig.resolve(
        {"model": "/models/m", "host_kv_cache_bytes": "1", "disk_kv_cache": disk}, relative_to=Path("/")
    )
    shown = result.without_folders({name: getattr(config, name) for name in config.__struct_fields__})
    assert shown["disk_kv_cache"] == {"path": "pages", "bytes": 7}
    assert shown["model"] == "m"


def test_the_header_says_what_the_engine_computes_in_even_where_the_checkpoint_decided_it():
    plain, fp8 = facts_of(None, "auto"), facts_of(AT_LOAD, "fp8_e4m3")
    assert (plain["quantization"], plain["kv_cache_dtype"]) == (None, "float32")
    assert fp8["quantization"] == {"method": "fp8", "weights": "channel", "activations": "token"}
    assert fp8["kv_cache_dtype"] == "fp8_e4m3"
