"""Plans of several ranks, from a table of the network to the file that an engine loads: on the synthetic device."""

import dataclasses
import json
from pathlib import Path

import pytest
from msgspec.structs import replace
from nanoflow_search.__main__ import On, run_search
from nanoflow_search.checkpoint import Run
from nanoflow_search.emit.tables import explain
from nanoflow_search.plan.candidates import find_candidates
from nanoflow_search.plan.partitions import solved
from nanoflow_search.profile.data import Profile
from nanoflow_search.request import Effort, SearchRequest
from support.places import LLAMA_3_8B, ROOT

from benchmarks.overlap import tensor_parallel
from benchmarks.overlap.shard_profile import shard_profile
from benchmarks.overlap.tensor_parallel import MODELS, case_at, copy_table, nccl_table
from nanoflow_backend.config.engine_config import EngineConfig
from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.config.precision import BFLOAT16
from nanoflow_backend.graph.collectives import AllReduceForm, describe_forms, model_in_forms
from nanoflow_backend.models.hugging_face import read_model_config
from nanoflow_backend.models.model import build
from nanoflow_backend.schedule.file import ScheduleFile
from nanoflow_backend.schedule.plan import ScheduleError
from nanoflow_backend.schedule.presets import sequential
from nanoflow_backend.schedule.source import find_schedules
from nanoflow_backend.schedule.validate import validate

FEW_LAYERS = replace(read_model_config(MODELS / "llama-3-70b"), num_layers=6)
NETWORKS = ROOT / "benchmarks" / "networks"
TABLES = [NETWORKS / "nccl_h200_tp8.json", NETWORKS / "copy_8_sms_h200_tp8.json"]
EFFORT = Effort(plans=3, turns=0)  # the grid alone: the two stages have tests of their own


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The schedule file that the command writes for eight ranks."""
    out = tmp_path_factory.mktemp("search") / "tp8.json"
    request = SearchRequest.of(LLAMA_3_8B, 8, ["1024/512"])
    run_search(request, [1024], EFFORT, On.SYNTHETIC, None, out, "timing", TABLES)
    return out


def test_a_file_for_eight_ranks_says_so_and_is_loaded_by_eight(written: Path) -> None:
    file = ScheduleFile.load(written)
    header, layer = file.header, build(read_model_config(LLAMA_3_8B), 8).layer
    assert (header.tensor_parallel, header.dense_batch_tokens, header.measured_us) == (8, 1024, None)
    assert header.predicted_us is not None
    assert not file.trials
    assert file.plans[0] == sequential(layer, 768), "smaller batches than were planned for run sequential"
    config = EngineConfig(model="m", schedule=str(written), tensor_parallel=8, dtype="bfloat16")
    config = replace(config, dense_batch_tokens=1024).settle("cpu")
    model = build(read_model_config(LLAMA_3_8B), 8)
    assert find_schedules(config, model, header.device, 132) == file.plans
    four, of_four = replace(config, tensor_parallel=4), build(read_model_config(LLAMA_3_8B), 4)
    with pytest.raises(ScheduleError, match="tensor_parallel is 8 in the file and 4 here"):
        find_schedules(four, of_four, header.device, 132)


def test_the_winner_runs_collectives_in_a_lane_of_their_own(written: Path) -> None:
    file, kept = ScheduleFile.load(written), json.loads(written.with_suffix(".result.json").read_text())
    winner = file.plans[1]
    assert winner.partition["network"] in (8, 24)
    assert set(winner.all_reduces.values()) == {AllReduceForm.NORMED}
    lanes = {x.lane for x in winner.launches if x.operation.endswith(".normed")}
    assert lanes == {"network"}
    assert kept["kind"] == "predicted, nothing timed"
    assert "memory bandwidth" in kept["assumed"]
    assert [header["name"] for header in kept["network"]] == ["NCCL", "copies on 8 SMs at 250 GB/s"]
    rows = kept["predictions"]
    assert [row["plan"] for row in rows] == ["sequential", "plan 1", "plan 2", "plan 3"]
    assert rows[1]["over_sequential"] == max(row["over_sequential"] for row in rows) > 1
    assert rows[1]["layer_us"] == pytest.approx(file.header.predicted_us, abs=0.1)


def test_a_predicted_file_is_explained(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    explain(ScheduleFile.load(written))
    told = " ".join(capsys.readouterr().out.split())
    assert "TP 8" in told
    assert "Predicted, and not timed: " in told
    assert "Batches of 769..1024 tokens" in told


def test_plans_for_70b_by_the_profile_of_8b() -> None:
    """As `python -m benchmarks tensor-parallel` does, on few layers: every plan is valid."""
    of_8b = Profile.load(ROOT / "benchmarks" / "schedules" / "profile_llama3_8b_h200.json")
    request = SearchRequest.of(MODELS / "llama-3-70b", 2, ["1024/512"])
    shard = shard_profile(of_8b, build(read_model_config(LLAMA_3_8B)).layer, request)
    # By hand: gate_up of a rank has 28672 x 8192 weights, that of 8B 28672 x 4096; a rank has 4 of 8 kv heads.
    for name, amount, more, longer in (
        ("gate_up", 1024, 1, 2),
        ("o.columns", 1024, 1, 2),
        ("attention/decode", 874240, 2, 1),
        ("attention/prefill", 698880, 1, 1),
        ("mlp_norm", 2048, 1, 2),
    ):
        own, other = shard.surface(name), of_8b.surface(name.removesuffix(".columns"))
        assert own.duration_us(more * amount) == pytest.approx(longer * other.duration_us(amount))
        assert own.dynamic_j(more * amount) == pytest.approx(longer * other.dynamic_j(amount))
    few = dataclasses.replace(SearchRequest.of(MODELS / "llama-3-70b", 8, ["1024/512"]), config=FEW_LAYERS)
    case = case_at(few, shard_profile(of_8b, build(read_model_config(LLAMA_3_8B)).layer, few), 2048, 250.0)
    plans = find_candidates(case, EFFORT, Run())
    assert len(plans) == 4
    for plan in plans:
        graph = case.graph(plan.schedule.all_reduces)
        validate(plan.schedule, graph, few.model.num_layers, 132, ranks=8)
    kinds = [(describe_forms(p.schedule.all_reduces), str(p.schedule.partition)) for p in plans]
    assert len(set(kinds)) == len(kinds)
    assert case.predicted_us(plans[1].schedule, "1024/512") < case.predicted_us(plans[0].schedule, "1024/512")


def test_the_two_stages_plan_for_a_network_lane() -> None:
    """On two chunks, so that programs are small: what they find is valid, with collectives apart."""
    of_8b = Profile.load(ROOT / "benchmarks" / "schedules" / "profile_llama3_8b_h200.json")
    few = dataclasses.replace(SearchRequest.of(MODELS / "llama-3-70b", 8, ["1024/512"]), config=FEW_LAYERS)
    case = case_at(few, shard_profile(of_8b, build(read_model_config(LLAMA_3_8B)).layer, few), 2048, 250.0)
    forms = dict.fromkeys(("attention_reduce", "mlp_reduce"), AllReduceForm.NORMED)
    graph, partition = case.graph(forms), {"network": 8, "compute": 124}
    effort = Effort(turns=1, time_limit_s=10.0)
    plans = solved(graph, 8, case.timing_model("1024/512"), partition, 1024, effort, Run())
    assert plans
    for plan, _ in plans:
        validate(replace(plan, all_reduces=forms), graph, few.model.num_layers, 132, ranks=8)
        assert set(plan.lanes) == {"network", "compute"}
        assert {x.operation for x in plan.launches if x.lane == "network"} == {f"{name}.normed" for name in forms}


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_the_files_of_70b_are_for_engines_of_so_many_ranks(ranks: int) -> None:
    file = ScheduleFile.load(ROOT / "benchmarks" / "schedules" / f"llama3_70b_tp{ranks}_h200_predicted.json")
    model = build(read_model_config(MODELS / "llama-3-70b"), ranks)
    file.check_header(model, BFLOAT16, "NVIDIA H200", ranks, 132)
    for plan in file.plans:
        graph = model_in_forms(model, plan.all_reduces, ranks).layer
        validate(plan, graph, model.num_layers, 132, ranks=ranks)


def test_fewer_ranks_send_at_the_rate_of_eight() -> None:
    size = 2048 * 8192 * 2
    assert nccl_table(8).time("all_reduce", size).us == 210
    assert nccl_table(2).time("all_reduce", size).us == pytest.approx(210 * (1 / 2) / (7 / 8))
    assert copy_table(4, 250.0).time("all_gather", size, 8).us == pytest.approx(3 / 4 * size / 250e3)


def test_predictions_that_could_not_be_written_do_not_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_parallel, "read_model_config", None)
    output, file = tmp_path / "r.json", tmp_path / "file"
    file.touch()
    with pytest.raises(ConfigError, match=r"none/r.json: No such file or directory"):
        tensor_parallel.main(tmp_path / "none" / "r.json")
    with pytest.raises(ConfigError, match=r"file/llama3_70b_tp2_h200_predicted.json: Not a directory"):
        tensor_parallel.main(output, schedules=file)
    with pytest.raises(ConfigError, match=r"none/llama3_70b_tp4_h200_predicted.json: No such file or directory"):
        tensor_parallel.main(output, [4], schedules=tmp_path / "none")
