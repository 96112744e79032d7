"""The search from end to end on the synthetic device: what it writes, when, and how it goes on after a cut."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import msgspec
import pytest
from msgspec.structs import replace
from nanoflow_search import checkpoint as checkpoint_module
from nanoflow_search.__main__ import On, run_search
from nanoflow_search.checkpoint import Checkpoint, SearchError
from nanoflow_search.cost.workload import Mix
from nanoflow_search.emit.picture import draw_plan
from nanoflow_search.emit.progress import ProgressDisplay
from nanoflow_search.emit.schedule_file import Outcome
from nanoflow_search.emit.tables import explain
from nanoflow_search.hardware.machine import SyntheticMachine
from nanoflow_search.plan import partitions
from nanoflow_search.plan.candidates import Candidate
from nanoflow_search.predict.predict import Timing
from nanoflow_search.profile.data import Profile
from nanoflow_search.profile.load import ProfileError
from nanoflow_search.request import Effort, Phase, SearchRequest
from nanoflow_search.search import search
from rich.console import Console
from support.models.shapes import config
from support.places import LLAMA_3_8B

from nanoflow_backend.config.engine_config import EngineConfig
from nanoflow_backend.config.precision import BFLOAT16
from nanoflow_backend.schedule.file import Header, ScheduleFile
from nanoflow_backend.schedule.plan import Schedule
from nanoflow_backend.schedule.presets import sequential
from nanoflow_backend.schedule.source import find_schedules, named_dense_batch_tokens

EFFORT = Effort(plans=2, turns=1, time_limit_s=20.0, rounds=2)
GRID_ALONE = replace(EFFORT, turns=0)  # for what is no matter of the solver: it takes most of a search's time
SIZES = (256, 384)


def request_for(*workloads: str, **precision: str) -> SearchRequest:
    """Eight layers of the model: a search simulates all of them, and they are alike."""
    whole = SearchRequest.of(LLAMA_3_8B, 1, workloads or ("512/1024",), **precision)
    return dataclasses.replace(whole, config=replace(whole.config, num_layers=8))


def run(
    folder: Path, machine: SyntheticMachine | None, until: Phase = Phase.TIMING, **options
) -> tuple[ScheduleFile, Outcome] | None:
    options = {"request": request_for(), "sizes": SIZES, "effort": EFFORT} | options
    with ProgressDisplay(Console(quiet=True)) as display:
        return search(
            machine=machine,
            profile_path=folder / "profile.json",
            checkpoint=Checkpoint(folder / "state"),
            display=display,
            until=until,
            **options,
        )


class Biased(SyntheticMachine):
    """Plans with more than one launch of an operation take `factor` as long as by the law."""

    def __init__(self, factor: float = 1.0, before: Callable[[], None] = lambda: None) -> None:
        self._factor, self._before = factor, before

    def timer(self, request: SearchRequest, mix: Mix) -> Callable[[Schedule], Timing]:
        by_law = super().timer(request, mix)

        def timer(schedule: Schedule) -> Timing:
            self._before()
            timing = by_law(sequential(request.model.layer, schedule.tokens))
            split = schedule != sequential(request.model.layer, schedule.tokens)
            return timing._replace(layer_us=timing.layer_us * (self._factor if split else 1.0))

        return timer


@pytest.fixture(scope="module", autouse=True)
def few_parts() -> Iterator[None]:
    """The stages cut attention's side in no more than two parts: whether a third would be worth it takes most time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(partitions, "PARTITION_PART_LIMITS", partitions.PARTITION_PART_LIMITS[:1])
        yield


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the profile and the plans that every search here begins with: they know nothing of a bias."""
    folder = tmp_path_factory.mktemp("planned")
    run(folder, SyntheticMachine(), Phase.PLANS)
    return folder


@pytest.fixture
def half_done(planned: Path, tmp_path: Path) -> Path:
    """A copy of that folder, where only the timing is left to do."""
    return shutil.copytree(planned, tmp_path / "search")


def saved(found: tuple[ScheduleFile, Outcome] | None, path: Path) -> bytes:
    assert found is not None
    found[0].save(path)
    return path.read_bytes()


def test_the_engine_takes_what_the_search_has_found(half_done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run(half_done, Biased(0.9))
    path = half_done / "schedule.json"
    saved(found, path)
    file = ScheduleFile.load(path)
    model = request_for().model
    assert [plan.tokens for plan in file.plans] == [128, 256, 256, 384, 384]
    assert file.plans[0] == sequential(model.layer, 128), "parts of small batches only cost"
    assert file.plans[2::2] == (sequential(model.layer, 256), sequential(model.layer, 384)), "where decodes read little"
    for plan in file.plans[1::2]:
        assert len(plan.launches) > len(model.layer.operations)
        assert 0 < plan.least_decode_kv_tokens < plan.tokens * 1024
    config = EngineConfig(model="m", schedule=str(path))
    assert named_dense_batch_tokens(config) == file.header.dense_batch_tokens == 384
    config = replace(config, dense_batch_tokens=384).settle("cuda")
    assert find_schedules(config, model, "synthetic H200-sustained", 132) == file.plans
    profile = Profile.load(half_done / "profile.json")
    assert (file.header.profile_hash, file.header.workloads) == (profile.hash(), ("512/1024",))
    assert ElementTree.fromstring(draw_plan(found[1].case, found[1].winner.schedule)).tag.endswith("svg")
    chosen = [trial for trial in file.trials if trial.chosen]
    assert [trial.dense_batch_tokens for trial in chosen] == [256, 384]
    assert all(trial.gain == pytest.approx(1 / 0.9) for trial in chosen)
    assert (file.header.predicted_us, file.header.measured_us) == (chosen[1].predicted_us, chosen[1].measured_us)
    assert list(file.bounds_us) == ["power", "compute lane", "memory lane", "packing"]
    assert file.bounds_us["packing"] >= max(file.bounds_us["compute lane"], file.bounds_us["memory lane"])
    predicted = [trial.predicted_us for trial in file.trials if trial.dense_batch_tokens == 384]
    assert min(predicted) > 0.99 * max(file.bounds_us.values())
    explain(file)
    told = capsys.readouterr().out
    for plan, sizes in zip(file.plans[1::2], ("129..256", "257..384"), strict=True):
        least = f"{plan.least_decode_kv_tokens:,}"
        assert f"Batches of {sizes} tokens whose decodes read {least} or more tokens of the KV cache: " in told
        assert f"Others of {sizes} tokens: sequential." in told


def test_plans_that_lose_are_rejected(half_done: Path) -> None:
    """However good their predictions; then one sequential plan is all that the file needs."""
    file = run(half_done, Biased(1.02))[0]
    assert file.plans == (sequential(request_for().model.layer, 384),)
    assert {trial.plan for trial in file.trials if trial.chosen} == {"sequential"}
    assert all(trial.gain == pytest.approx(1 / 1.02) for trial in file.trials if trial.plan != "sequential")


def test_predictions_are_on_file_before_anything_is_timed(half_done: Path) -> None:
    kept: list[bytes] = []
    paths = [half_done / "state" / str(tokens) / "predictions.json" for tokens in SIZES]
    found = run(half_done, Biased(0.9, before=lambda: kept.append(b"".join(path.read_bytes() for path in paths))))
    timed = [trial for trial in found[0].trials if trial.plan != "sequential"]
    assert len(kept) == len(timed) * EFFORT.rounds * 4
    assert set(kept) == {b"".join(path.read_bytes() for path in paths)}
    predicted = {
        (tokens, entry["plan"]): entry["layer_us"]
        for tokens, path in zip(SIZES, paths, strict=True)
        for entry in json.loads(path.read_bytes())
    }
    assert predicted == {(trial.dense_batch_tokens, trial.plan): trial.predicted_us for trial in found[0].trials}
    assert {(tokens, plan) for tokens in SIZES for plan in ("sequential", "plan 1")} <= predicted.keys()
    predicted_us = [us for (tokens, plan), us in predicted.items() if tokens == 384 and plan != "sequential"]
    assert predicted_us == sorted(predicted_us), "the best comes first"
    assert all(b / a > 1.00005 for a, b in pairwise(predicted_us)), "and none is another one turned"


def test_a_search_that_is_cut_anywhere_ends_as_one_that_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut before each of the files that it writes, one after the other, and now and then in the profile."""
    whole = saved(run(tmp_path / "whole", Biased(0.9), sizes=(256,)), tmp_path / "whole.json")
    write, save, cut = checkpoint_module.write_atomically, Profile.save, {"calls": 0}

    def cutting(call: Callable[..., None], every: int) -> Callable[..., None]:
        def wrapped(*arguments: object) -> None:
            cut["calls"] += 1
            if cut["calls"] % every == 0:
                raise KeyboardInterrupt
            call(*arguments)

        return wrapped

    monkeypatch.setattr(checkpoint_module, "write_atomically", cutting(write, 2))
    monkeypatch.setattr(Profile, "save", cutting(save, 30))
    cuts = 0
    while True:
        try:
            found = run(tmp_path / "cut", Biased(0.9), sizes=(256,))
            break
        except KeyboardInterrupt:
            cuts += 1
    assert cuts > 10
    assert saved(found, tmp_path / "cut.json") == whole


def test_what_is_done_needs_no_machine(tmp_path: Path) -> None:
    """A profile from the GPU's machine, plans from one without, times from the first again."""
    with pytest.raises(SearchError, match=r"profile\.json: there is no profile, and no GPU here"):
        run(tmp_path, None, Phase.PLANS, sizes=(256,), effort=GRID_ALONE)
    assert run(tmp_path, Biased(0.9), Phase.PROFILE, sizes=(256,), effort=GRID_ALONE) is None
    assert not (tmp_path / "state").exists()
    with pytest.raises(SearchError, match=r"profile\.json: was taken of layer \w+ in bfloat16 .* in float16 on 1"):
        run(tmp_path, None, Phase.PLANS, request=request_for(dtype="float16"))
    assert run(tmp_path, None, Phase.PLANS, sizes=(256,), effort=GRID_ALONE) is None
    with pytest.raises(SearchError, match="the plans are found; run the same command where a GPU is to time them"):
        run(tmp_path, None, sizes=(256,), effort=GRID_ALONE)
    there = run(tmp_path, Biased(0.9), sizes=(256,), effort=GRID_ALONE)
    assert there is not None
    assert run(tmp_path, None, sizes=(256,), effort=GRID_ALONE) == there


def test_lanes_that_share_sms_are_searched_if_asked_for(tmp_path: Path) -> None:
    def plans(name: str, **options: bool) -> list[Schedule]:
        run(tmp_path / name, SyntheticMachine(), Phase.PLANS, sizes=(256,), effort=replace(EFFORT, plans=8, **options))
        path = tmp_path / name / "state" / "256" / "plans.msgpack"
        return [found.schedule for found in msgspec.msgpack.decode(path.read_bytes(), type=list[Candidate])[1:]]

    assert all(plan.partition for plan in plans("own"))
    assert {bool(plan.partition) for plan in plans("both", shared=True)} == {True, False}


def test_the_state_of_another_search_is_refused(tmp_path: Path) -> None:
    run(tmp_path, SyntheticMachine(), Phase.PLANS, sizes=(256,), effort=GRID_ALONE)
    with pytest.raises(
        SearchError, match=r"state of another search: workloads is \('512/1024',\) there and \('1/1',\) h"
    ):
        run(tmp_path, SyntheticMachine(), request=request_for("1/1"), sizes=(256,), effort=GRID_ALONE)
    with pytest.raises(SearchError, match=r"dense_batch_tokens is \(256,\) there and \(256, 384\) here"):
        run(tmp_path, SyntheticMachine(), effort=GRID_ALONE)
    other = SearchRequest("tiny", config("llama"), 1, ("512/1024",))
    (tmp_path / "state" / "request.json").unlink()
    with pytest.raises(ProfileError, match=r"profile\.json: was taken of"):
        run(tmp_path, SyntheticMachine(), request=other)
    (tmp_path / "state" / "request.json").write_text("{")
    with pytest.raises(SearchError, match=r"request\.json: Input data was truncated; without this file"):
        run(tmp_path, SyntheticMachine())


def test_a_plan_for_several_workloads_is_predicted_and_timed_on_each(tmp_path: Path) -> None:
    both = ("512/1024", "1024/512")
    file = run(tmp_path, Biased(0.9), request=request_for(*both), sizes=(256,), effort=GRID_ALONE)[0]
    assert file.header.workloads == both
    assert [(trial.plan, trial.workload) for trial in file.trials] == [
        (plan, workload) for workload in both for plan in ("sequential", "plan 1", "plan 2")
    ]
    chosen = [trial for trial in file.trials if trial.chosen]
    assert file.header.measured_us == pytest.approx(sum(trial.measured_us for trial in chosen) / 2)


def test_the_command_writes_file_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (request_for(), [256], GRID_ALONE, On.SYNTHETIC, None, tmp_path / "plan.json")
    run_search(*arguments, Phase.PROFILE)
    assert "profile done" in capsys.readouterr().out
    run_search(*arguments, Phase.TIMING)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "plan.json", "plan.profile.json", "plan.result.json", "plan.search", "plan.svg",
    ]  # fmt: skip
    assert "B_dense 256" in capsys.readouterr().out


def test_a_file_without_an_account_is_explained_as_such(capsys: pytest.CaptureFixture[str]) -> None:
    header = Header(
        model_fingerprint="0" * 16, precision=BFLOAT16, device="cpu", tensor_parallel=1, dense_batch_tokens=8
    )
    explain(ScheduleFile(header=header, plans=(sequential(request_for().model.layer, 8),)))
    assert "Nothing is told in this file of how its plans were found." in capsys.readouterr().out
