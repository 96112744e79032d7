"""A version's folder: engine.json, or vllm_backend's model.json in its place."""

import json

import pytest
from support.places import DEMO_MODEL

from nanoflow_backend.config.engine_config import EngineConfig
from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.config.version_folder import load


def folder(path, **files):
    for name, fields in files.items():
        (path / f"{name}.json").write_text(json.dumps(fields))
    return path


def test_model_json_is_read_where_there_is_no_engine_json(tmp_path):
    version = folder(tmp_path, model={"model": str(DEMO_MODEL), "max_num_seqs": 8, "enforce_eager": True})
    expected = EngineConfig(model=str(DEMO_MODEL), max_running=8, cuda_graphs=False)
    assert load(version, {}) == expected
    assert load(version, {"max_running": "4"}).max_running == 4, "config.pbtxt wins"
    folder(tmp_path, engine={"model": str(DEMO_MODEL), "max_running": 2})
    assert load(version, {}).max_running == 2, "engine.json comes first"


def test_a_relative_model_starts_at_the_file(tmp_path):
    (tmp_path / "weights").mkdir()
    assert load(folder(tmp_path, model={"model": "weights"}), {}).model == str(tmp_path / "weights")


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        ({"max_num_seqs": 0}, r"model.json: max_running: expected .* got 0 \(max_running is max_num_seqs there\)"),
        ({"enforce_eager": 3}, r"Expected `bool`, .* `\$.cuda_graphs` \(cuda_graphs is enforce_eager there\)"),
        ({"kv_cache_dtype": "fp8_e5m2"}, "model.json: Invalid enum value 'fp8_e5m2'.*kv_cache_dtype"),
        ({"tensor_parallel_size": 3}, r"tensor_parallel: .* \(tensor_parallel is tensor_parallel_size there\)"),
        ({"quantization": "awq"}, "model.json: Invalid enum value 'awq'.*quantization"),
        ({"gpu_memory_utilization": 2}, r"gpu_memory_utilization: expected a number in \(0, 1\], got 2.0$"),
    ],
)
def test_errors_name_the_file_and_the_argument(tmp_path, args, complaint):
    with pytest.raises(ConfigError, match=complaint):
        load(folder(tmp_path, model={"model": str(DEMO_MODEL), **args}), {})


def test_without_either_file_engine_json_is_what_is_missing(tmp_path):
    with pytest.raises(ConfigError, match=r"engine\.json: No such file"):
        load(tmp_path, {})


def test_a_hub_id_without_download_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(ConfigError, match=r"model\.json: model .*hf download someone/tiny"):
        load(folder(tmp_path, model={"model": "someone/tiny"}), {})
