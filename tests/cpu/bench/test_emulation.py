"""`nanoflow bench offline --emulate-tp`: rank 0 of a group alone, what its result says, and what is refused."""

import json
from pathlib import Path

import pytest
from support.commands.command_line import assert_one_line, run_here
from support.places import ROOT

from nanoflow_backend.bench.emulation import Emulation
from nanoflow_backend.config.engine_config import EngineConfig
from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.models.model import build
from nanoflow_backend.runtime.collectives.emulated import Emulated

HEADER = {
    "name": "a slow net",
    "device": "cpu",
    "ranks": 2,
    "source": "a test",
    "link_pj_per_byte": [210, 430],
    "rank_skew": [0.01, 0.03],
}
TIMES = [
    {"collective": "all_reduce", "bytes": size, "sms": 4, "us": us} for size, us in ((1000, 1000.0), (100_000, 3000.0))
]
SMALL = ("--input-tokens", "20", "--output-tokens", "5", "--requests", "6")


@pytest.fixture(scope="module")
def network(tmp_path_factory) -> Path:
    return table(tmp_path_factory.mktemp("network"))


def table(folder: Path, **header) -> Path:
    path = folder / "network.json"
    path.write_text(json.dumps({"header": HEADER | header, "times": TIMES}))
    return path


def run(model, *words):
    return run_here("bench", "offline", "--model", model, *SMALL, *words)


@pytest.mark.parametrize("rate", [None, "0.01"])
def test_a_shard_runs_and_its_result_says_what_it_is(model, network, tmp_path, rate):
    words = ("--emulate-tp", "2", "--network", network, "--output", tmp_path / "r", "--set", "schedule=nano-batched-2")
    done = run(model, *words, *(("--network-gb-per-s", rate) if rate else ()))
    assert done.returncode == 0, done.stderr
    assert "EMULATED: rank 0 of 2 alone" in " ".join(done.stdout.split())
    measured = json.loads((tmp_path / "r").read_text())
    about = measured["emulated"]
    assert (about["ranks"], about["rank"]) == (2, 0)
    assert about["network"] == ("assumed: 0.01 GB/s on 8 SMs" if rate else "a slow net")
    assert (about["link_pj_per_byte"], about["rank_skew"]) == ([210, 430], [0.01, 0.03])
    assert about["tokens_are"].startswith("meaningless")
    assert "without its links" in about["energy_is"]
    assert measured["settings"]["tensor_parallel"] == 2
    assert measured["settings"]["load_format"] == "dummy"
    assert "rank 0 of TP 2 alone, emulated, on cpu" in measured["engine_is"]
    assert measured["tokens_per_s_per_device"] == pytest.approx(measured["total_tokens_per_s"] / 2, abs=0.1)
    layers_us = measured["steps"] * build_layers(model) * 2 * 1000.0
    assert measured["wall_s"] >= 1e-6 * layers_us, "every all-reduce takes its time"


def build_layers(model: Path) -> int:
    return json.loads((model / "config.json").read_text())["num_hidden_layers"]


def test_the_engine_has_a_ranks_shapes_and_no_other_rank(model, network):
    emulation = Emulation.asked_for(2, network, None)
    assert emulation is not None
    engine = emulation.make_engine(model, ["dense_batch_tokens=64", "kv_cache_tokens=1024"])
    binding = engine.executor.worker.program.binding
    assert isinstance(binding.collectives, Emulated)
    shard = build(engine.model_config, 2).layer
    weights = {
        parameter.name: tuple(binding.weights[f"layers.0.{parameter.name}"].shape) for parameter in shard.parameters
    }
    assert weights == {parameter.name: parameter.shape for parameter in shard.parameters}
    assert engine.executor._ranks is None
    engine.close()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--emulate-tp", "2"), "--emulate-tp: expected --network, a table of what collectives take"),
        (("--network", "NETWORK"), "--network: expected none without --emulate-tp"),
        (("--network-gb-per-s", "9"), "--network-gb-per-s: expected none without --emulate-tp"),
        (
            ("--emulate-tp", "2", "--network", "NETWORK", "--network-gb-per-s", "nan"),
            "--network-gb-per-s: expected a finite number above 0, got nan",
        ),
        (("--emulate-tp", "4", "--network", "NETWORK"), "--emulate-tp: expected 2, the ranks of "),
        (("--emulate-tp", "2", "--network", "missing.json"), "missing.json: No such file or directory"),
        (
            ("--emulate-tp", "2", "--network", "NETWORK", "--set", "tensor_parallel=2"),
            "--set tensor_parallel: expected none beside --emulate-tp",
        ),
        (
            ("--emulate-tp", "2", "--network", "NETWORK", "--set", "load_format=safetensors"),
            "load_format: expected dummy beside --emulate-tp, got safetensors",
        ),
        (
            ("--emulate-tp", "2", "--network", "NETWORK", "--set", "schedule=auto"),
            "schedule: expected a preset or a schedule file beside --emulate-tp, got auto",
        ),
    ],
)
def test_what_does_not_go_together_is_named(model, network, words, message):
    assert_one_line(run(model, *(network if word == "NETWORK" else word for word in words)), message)


def test_heads_that_the_ranks_cannot_share_are_named_before_work_begins(model, tmp_path):
    done = run(model, "--emulate-tp", "3", "--network", table(tmp_path, ranks=3))
    assert_one_line(done, "tensor_parallel: expected")


@pytest.mark.parametrize("name", ["link_pj_per_byte", "rank_skew"])
def test_a_table_must_say_what_an_emulation_lacks(tmp_path, name):
    with pytest.raises(ConfigError, match="expected link_pj_per_byte and rank_skew, which an emulation lacks"):
        Emulation.asked_for(2, table(tmp_path, **{name: None}), None)


def test_no_engine_that_serves_can_be_emulated():
    for field in ("emulate_tp", "network", "network_gb_per_s"):
        with pytest.raises(ConfigError, match=f"unknown field `{field}`"):
            EngineConfig.resolve({"model": "m", field: 8}, relative_to=ROOT)
    for command in (("serve",), ("generate",), ("bench", "online"), ("trace",)):
        refused = run_here(*command, "--emulate-tp", "8")
        assert refused.returncode == 2
        assert "No such option: --emulate-tp" in refused.stderr
