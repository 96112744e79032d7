"""A trace of a few steps of the demo model: the file's form, its lanes, and that what it says adds up."""

import json
from collections import Counter, defaultdict
from itertools import pairwise

import pytest
from support.commands.command_line import ROOT, assert_one_line, run_here
from support.schedule.schedules import plans, save

from nanoflow_backend.bench.offline_run import queue_all
from nanoflow_backend.bench.step_trace.launch_times import LAPS, ClockedLaunches
from nanoflow_backend.bench.step_trace.traced_steps import WorkEndedError, trace_steps
from nanoflow_backend.bench.workload import constant
from nanoflow_backend.engine import Engine
from nanoflow_backend.models.hugging_face import read_model_config
from nanoflow_backend.models.model import build

MODEL = ROOT / "demo" / "tiny-llama"
MODEL_GRAPHS = build(read_model_config(MODEL))
GRAPH = MODEL_GRAPHS.layer
TOKENS, STEPS, LAYERS = 64, 6, 4
HOST, DEVICE = 1, 2
NS = 2e-3  # in microseconds: how exact the file is
SCHEDULES = {name: plans(GRAPH, TOKENS)[name] for name in ("sequential", "two", "apart", "overlapped")}


@pytest.fixture(scope="module", params=SCHEDULES)
def schedule(request):
    return SCHEDULES[request.param]


@pytest.fixture(scope="module")
def trace(schedule, tmp_path_factory):
    """Of steps in which some requests decode, and others have their prompts computed."""
    folder = tmp_path_factory.mktemp("trace")
    plan = save(folder / "plan.json", MODEL_GRAPHS, schedule)
    sizes = ("--input-tokens", 40, "--output-tokens", 30, "--requests", 20, "--steps", STEPS, "--skip-steps", 1)
    settings = ("--set", f"schedule={plan}", "--set", f"dense_batch_tokens={TOKENS}", "--set", "kv_cache_tokens=2048")
    done = run_here("trace", "--model", MODEL, "--output", folder / "trace.json", *sizes, *settings, "--begin", "start")
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "trace.json").read_text())


def events(trace, phase, process=None, kind=None):
    return [
        event
        for event in trace["traceEvents"]
        if event["ph"] == phase and process in (None, event["pid"]) and kind in (None, event.get("cat"))
    ]


def end(event):
    return event["ts"] + event["dur"]


def steps(trace):
    """(the forward, its launches) of each step."""
    launches = events(trace, "X", DEVICE, "launch")
    forwards = [event for event in events(trace, "X", DEVICE, "step") if event["name"] == "forward"]
    return [(forward, [x for x in launches if forward["ts"] <= x["ts"] <= end(forward)]) for forward in forwards]


def test_the_file_has_the_form_that_viewers_read(trace):
    assert {"command", "date", "versions", "model", "schedule", "displayTimeUnit", "traceEvents"} <= trace.keys()
    assert {event["ph"] for event in trace["traceEvents"]} <= set("MXCsf")
    named = {(event["pid"], event.get("tid")) for event in events(trace, "M") if event["name"].endswith("_name")}
    for event in trace["traceEvents"]:
        assert isinstance(event["name"], str)
        if event["ph"] != "M":
            assert event["ts"] >= 0, event
            assert {(event["pid"], None), (event["pid"], event["tid"])} <= named, event
        if event["ph"] == "X":
            assert event["dur"] >= 0, event
    slices = defaultdict(list)
    for event in events(trace, "X"):
        slices[event["pid"], event["tid"]].append(event)
    arrows = defaultdict(dict)
    for event in events(trace, "s") + events(trace, "f"):
        assert event["ph"] not in arrows[event["id"]], "an arrow has one begin and one end"
        arrows[event["id"]][event["ph"]] = event
        assert any(x["ts"] <= event["ts"] <= end(x) for x in slices[event["pid"], event["tid"]]), "it binds to a slice"
    for arrow in arrows.values():
        assert arrow["s"]["ts"] <= arrow["f"]["ts"]
        assert arrow["f"]["bp"] == "e"


def test_what_a_lane_does_does_not_overlap(trace, schedule):
    tracks = {
        event["tid"]: event["args"]["name"] for event in events(trace, "M", DEVICE) if event["name"] == "thread_name"
    }
    assert list(tracks.values()) == ["step", *(f"lane {lane}" for lane in schedule.lanes)]
    for track in tracks:
        in_track = [event for event in events(trace, "X", DEVICE) if event["tid"] == track]
        assert in_track
        for before, after in pairwise(sorted(in_track, key=lambda event: (event["ts"], end(event)))):
            assert end(before) <= after["ts"] + NS, (before, after)


def test_every_launch_of_the_schedule_appears_once_a_layer(trace, schedule):
    assert len(steps(trace)) == STEPS
    for forward, launches in steps(trace):
        ranges = schedule.fit(forward["args"]["rows with padding"])
        wanted = {
            (layer, number) for layer in range(LAYERS) for number, (start, stop) in enumerate(ranges) if start < stop
        }
        found = Counter((x["args"]["layer"], x["args"]["launch"]) for x in launches)
        assert found == dict.fromkeys(wanted, 1)
        for x in launches:
            start, stop = ranges[x["args"]["launch"]]
            launch = schedule.launches[x["args"]["launch"]]
            assert (x["name"], x["args"]["operation"]) == (launch.operation,) * 2
            assert x["args"]["tokens"] == f"{start}..{stop - 1}"
    assert sum(len(launches) for _, launches in steps(trace)) == len(events(trace, "X", DEVICE, "launch"))


def test_a_wait_ends_before_its_launch_begins(trace, schedule):
    waits = events(trace, "X", DEVICE, "wait")
    assert bool(waits) == (len(schedule.lanes) > 1)
    for _, launches in steps(trace):
        of = {(x["args"]["layer"], x["args"]["launch"]): x for x in launches}
        for (layer, number), x in of.items():
            ends = [
                end(of[layer - wait.layers_back, wait.launch])
                for wait in schedule.launches[number].waits
                if (layer - wait.layers_back, wait.launch) in of
            ]
            assert max(ends, default=0) <= x["ts"] + NS
            before = max((end(y) for y in launches if y["tid"] == x["tid"] and y["ts"] < x["ts"]), default=0)
            own = [wait for wait in waits if wait["tid"] == x["tid"] and before - NS <= wait["ts"] < x["ts"]]
            if ends and max(ends) > before > 0:
                (wait,) = own
                assert wait["ts"] == pytest.approx(before, abs=NS)
                assert end(wait) == pytest.approx(max(ends), abs=NS)
            elif before > 0:
                assert own == []


def test_sums_are_those_of_the_events(trace):
    launches = events(trace, "X", DEVICE, "launch")
    sums = defaultdict(float)
    for event in launches + [event for event in events(trace, "X", DEVICE, "step") if event["name"] == "tail"]:
        sums[event["name"]] += event["dur"] / 1e3 / STEPS
    assert trace["operations_ms_per_step"] == pytest.approx(sums, abs=1e-4)
    assert sum(trace["lanes_busy_ms_per_step"].values()) == pytest.approx(sum(sums.values()) - sums["tail"], abs=1e-4)
    waiting = sum(event["dur"] for event in events(trace, "X", DEVICE, "wait"))
    assert sum(trace["lanes_waiting_ms_per_step"].values()) == pytest.approx(waiting / 1e3 / STEPS, abs=1e-4)
    # Of the host, what lies within another span is counted once: all together is the time of the steps.
    whole = sum(event["dur"] for event in events(trace, "X", HOST) if event["name"] in ("step", "read the trace"))
    assert sum(trace["host_ms_per_step"].values()) == pytest.approx(whole / 1e3 / STEPS, abs=1e-3)
    assert whole / 1e3 / STEPS <= trace["step_ms"] + 1e-3


def test_the_hosts_work_is_that_of_a_step_in_its_order(trace):
    host = events(trace, "X", HOST)
    whole = [event for event in host if event["name"] == "step"]
    assert len(whole) == STEPS
    outer = ["schedule", "launch forward", "collect", "retire", "masks", "launch tail", "detokenise"]
    for step in whole:
        within = [event for event in host if event is not step and step["ts"] <= event["ts"] <= end(step)]
        assert all(end(event) <= end(step) + NS for event in within)
        assert [event["name"] for event in within if event["name"] in outer] == outer
        forward = next(event for event in within if event["name"] == "launch forward")
        inner = [event for event in within if event["name"] not in outer]
        assert [event["name"] for event in inner] == ["pack", "send", "issue"]
        assert all(forward["ts"] <= event["ts"] and end(event) <= end(forward) + NS for event in inner)


def test_the_tokens_of_each_step_are_those_of_an_engine_that_nobody_looks_at(trace):
    engine = Engine.from_pretrained(MODEL, kv_cache_tokens=2048, dense_batch_tokens=TOKENS)
    queue_all(engine, constant(40, 30, 20))
    batches = []
    while engine.has_work:
        engine.step()
        batches += [engine.last_batch] if engine.last_batch else []
    facts = [forward["args"] for forward, _ in steps(trace)]
    before = 1 + STEPS + LAPS  # one skipped, as many untraced as traced, and those that fill the device again
    tokens = [event["args"] for event in events(trace, "C")]
    for batch, fact, counted in zip(batches[before : before + STEPS], facts, tokens, strict=True):
        decodes = len(batch.decode_slots)
        assert (fact["step"], fact["decodes"], fact["prompt tokens"]) == (batch.step, decodes, batch.tokens - decodes)
        assert fact["mean context of decodes"] == pytest.approx(1 + sum(batch.decode_positions) / decodes, abs=0.06)
        assert counted == {"decodes": decodes, "prompts": batch.tokens - decodes}
    assert all(fact["prompt tokens"] for fact in facts[:2])


def generated(traced_steps):
    engine = Engine.from_pretrained(MODEL, kv_cache_tokens=2048, dense_batch_tokens=64, schedule="nano-batched-2")
    queue_all(engine, constant(30, 20, 5))
    tokens = defaultdict(list)

    def take(deltas):
        for delta in deltas:
            tokens[delta.request_id] += delta.token_ids

    if traced_steps:
        worker = engine.executor.worker
        traced = trace_steps(engine, worker, ClockedLaunches(), traced_steps, take)
        assert len(traced.steps) == traced_steps
        for watched in (worker, worker.program, engine, engine.scheduler, engine.executor):
            assert (
                not {"launch_forward", "launch_tail", "forward", "_masks", "schedule", "collect"} & vars(watched).keys()
            )
        assert worker.program._watcher is None
    while engine.has_work:
        take(engine.step())
    return tokens


def test_a_trace_changes_nothing_and_leaves_nothing_behind():
    assert generated(traced_steps=7) == generated(traced_steps=0)


def test_steps_without_async_scheduling_are_traced_too(tmp_path):
    output = tmp_path / "trace.json"
    sizes = ("--input-tokens", 10, "--output-tokens", 20, "--requests", 2, "--steps", 3)
    flags = ("--set", "async_scheduling=false", "--set", "kv_cache_tokens=2048")
    done = run_here("trace", "--model", MODEL, "--output", output, *sizes, *flags, "--begin", "decodes")
    assert done.returncode == 0, done.stderr
    found = json.loads(output.read_text())
    assert len(steps(found)) == 3
    assert all(forward["args"]["prompt tokens"] == 0 for forward, _ in steps(found))
    assert "a step: " in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--requests", 1, "--output-tokens", 9),
            "--requests 1 of 128/9 tokens: expected work for 20 more steps, it ended",
        ),
        (
            ("--requests", 1, "--output-tokens", 1, "--begin", "decodes"),
            "--requests 1 of 128/1 tokens: expected a step of decodes alone, there was none",
        ),
        (("--trace", ROOT / "README.md", "--dataset", "lmsys-like"), "--dataset: expected none beside --trace"),
        (("--output", "/dev/full"), "nanoflow: /dev/full: "),
    ],
)
def test_what_cannot_be_traced_is_named(tmp_path, arguments, message):
    output = () if "--output" in arguments else ("--output", tmp_path / "trace.json")
    assert_one_line(run_here("trace", "--model", MODEL, *output, *arguments), message)
    assert not (tmp_path / "trace.json").exists()


def test_work_that_ends_is_told_before_a_step_of_nothing():
    engine = Engine.from_pretrained(MODEL, kv_cache_tokens=2048)
    queue_all(engine, constant(4, 5, 1))
    with pytest.raises(WorkEndedError, match="expected work for 9 more steps, it ended after"):
        trace_steps(engine, engine.executor.worker, ClockedLaunches(), 9, len)
