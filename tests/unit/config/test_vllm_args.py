"""The engine arguments of vLLM: translated, refused or named in a warning, each of them."""

import pytest

from nanoflow_backend.config.engine_config import EngineConfig
from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.config.vllm_args import DECISIVE, IDLE, KNOWN, LOCATING, TRANSLATED, engine_fields, spoken

IDLE_NAMES = " ".join(IDLE.values()).split()


def fields(folder, **args):
    return engine_fields(args, folder, "model.json")


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ({"max_model_len": 4096}, {"max_model_tokens": 4096}),
        ({"max_model_len": -1}, {}),
        ({"max_num_batched_tokens": 2048, "max_num_seqs": 64}, {"dense_batch_tokens": 2048, "max_running": 64}),
        ({"gpu_memory_utilization": 0.5}, {"gpu_memory_utilization": 0.5}),
        ({"tensor_parallel_size": 2, "device_ids": [1, 3]}, {"tensor_parallel": 2, "gpus": [1, 3]}),
        ({"dtype": "half", "kv_cache_dtype": "auto"}, {"dtype": "float16", "kv_cache_dtype": "auto"}),
        ({"quantization": "fp8", "kv_cache_dtype": "fp8"}, {"quantization": "fp8", "kv_cache_dtype": "fp8_e4m3"}),
        ({"quantization": "compressed-tensors"}, {}),
        ({"dtype": "float"}, {"dtype": "float32"}),
        ({"enable_prefix_caching": False, "async_scheduling": None}, {"prefix_caching": False}),
        ({"enforce_eager": True}, {"cuda_graphs": False}),
        ({"kv_offloading_size": 1.5, "kv_offloading_backend": "native"}, {"host_kv_cache_bytes": 3 * 2**29}),
        ({"kv_offloading_size": "2"}, {"host_kv_cache_bytes": 2**31}),
        ({"kv_offloading_size": 0}, {"host_kv_cache_bytes": 0}),
        ({"enforce_eager": "False"}, {"cuda_graphs": True}),
        ({"load_format": "auto"}, {"load_format": "safetensors"}),
        ({"load_format": "dummy", "seed": 5}, {"load_format": "dummy", "seed": 5}),
        ({"long_prefill_token_threshold": 0}, {}),
        ({"long_prefill_token_threshold": 512}, {"chunk_tokens": 512}),
        ({"num_gpu_blocks_override": 100}, {"kv_cache_tokens": 1600}),
        ({"num_gpu_blocks_override": 100, "block_size": 32}, {"kv_cache_tokens": 3200}),
        ({"quantization": None, "enable_lora": "false", "pipeline_parallel_size": 1, "hf_overrides": {}}, {}),
        ({"tokenizer": "m"}, {}),
        ({"kv_events_config": {}}, {}),
        ({"kv_events_config": {"enable_kv_cache_events": False, "publisher": "zmq"}}, {}),
        (
            {"kv_events_config": {"enable_kv_cache_events": True, "publisher": None, "topic": "kv@a@b", "hwm": 7}},
            {"kv_events": {"topic": "kv@a@b", "hwm": 7}},
        ),
    ],
)
def test_what_has_an_equivalent_is_translated(tmp_path, args, expected):
    assert fields(tmp_path, model="m", **args) == {"model": "m", **expected}


def test_events_that_are_no_section_of_vllm_are_refused_by_their_name_there(tmp_path):
    for events, words in (
        (["zmq"], "Expected `object | null`, got `array`"),
        ({"enable_kv_cache_events": 2}, "unknown field `enable_kv_cache_events`"),
        ({"enable_kv_cache_events": True, "endpoint": "*:5557"}, r"kv_events.endpoint: expected tcp://HOST:PORT"),
    ):
        with pytest.raises(ConfigError, match=words) as error:
            EngineConfig.resolve(fields(tmp_path, model="m", kv_events_config=events), tmp_path)
        assert spoken(str(error.value)).endswith("(kv_events is kv_events_config there)")


def test_host_memory_that_cannot_be_is_refused_by_its_name_there(tmp_path):
    for size, words in ((-1, "expected an integer >= 0"), ("lots", "Expected `int`"), (float("inf"), "Expected `int`")):
        with pytest.raises(ConfigError, match=words) as error:
            EngineConfig.resolve(fields(tmp_path, model="m", kv_offloading_size=size), tmp_path)
        assert spoken(str(error.value)).endswith("(host_kv_cache_bytes is kv_offloading_size there)")


def test_every_translation_is_a_field_of_engine_json():
    assert {field for field, _ in TRANSLATED.values()} <= set(EngineConfig.__struct_fields__)


def test_each_argument_is_in_one_table():
    assert len(KNOWN) == len(TRANSLATED) + len(DECISIVE) + len(LOCATING) + len(IDLE_NAMES)


def test_all_that_results_or_devices_depend_on_is_refused_at_once(tmp_path):
    with pytest.raises(ConfigError) as refusal:
        fields(tmp_path, model="m", tokenizer="other", max_modle_len=5, **dict.fromkeys(DECISIVE, "something else"))
    message = str(refusal.value)
    for name in DECISIVE:
        assert f" {name}: not implemented; expected null" in message
    assert "max_modle_len: unknown argument of vLLM's engine" in message
    assert "tokenizer: not implemented; expected null or the model, got 'other'" in message


def test_neutral_values_of_what_is_refused_pass(tmp_path):
    for name, neutral in DECISIVE.items():
        for value in (None, *neutral):
            assert fields(tmp_path, model="m", **{name: value}) == {"model": "m"}


def test_what_is_idle_is_named_in_one_warning_with_the_reason_and_without_its_value(tmp_path, caplog):
    assert fields(tmp_path, model="m", swap_space=4, disable_log_requests=True, hf_token="secret") == {"model": "m"}
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    for part in ("swap_space (weights stay in the device's memory", "disable_log_requests (", "hf_token ("):
        assert part in record.message
    assert "secret" not in record.message
    caplog.clear()
    fields(tmp_path, model="m", swap_space=None, seed=1)
    assert not caplog.records


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A download cache as Hugging Face's tools lay it out, with one model."""
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    model = tmp_path / "hub" / "models--someone--tiny"
    for commit in ("aaa", "bbb"):
        (model / "snapshots" / commit).mkdir(parents=True)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("bbb\n")
    return model


def test_a_hub_id_is_where_vllm_has_downloaded_it(hub, tmp_path):
    version = tmp_path / "vllm_model" / "1"
    assert fields(version, model="someone/tiny") == {"model": str(hub / "snapshots" / "bbb")}
    assert fields(version, model="someone/tiny", revision="aaa") == {"model": str(hub / "snapshots" / "aaa")}
    assert fields(version, model="someone/tiny", revision="ccc") == {"model": "someone/tiny"}
    assert fields(version, model="someone/other") == {"model": "someone/other"}
    assert fields(version, model="someone/tiny", download_dir=str(version)) == {"model": "someone/tiny"}
    (version / "someone" / "tiny").mkdir(parents=True)
    assert fields(version, model="someone/tiny") == {"model": "someone/tiny"}, "a relative path comes first"


def test_the_download_cache_may_be_named_by_itself(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", "/nowhere")
    monkeypatch.setenv("HF_HUB_CACHE", str(hub.parent))
    assert fields(tmp_path, model="someone/tiny") == {"model": str(hub / "snapshots" / "bbb")}
