"""nanoflow serve: what it says of a wrong configuration, and what it shows of the log."""

import json
import shutil
import signal

from support.commands.command_line import assert_one_line, run, start
from support.places import DEMO_MODEL, ROOT
from support.waiting import until

PORTS = ("--http-port", "0", "--grpc-port", "0", "--metrics-port", "0")


def repository(folder, **engine):
    """A copy of the drop-in folder; without `engine` fields with the engine.json that leads to the demo model."""
    shutil.copytree(ROOT / "model_repository", folder)
    if engine:
        (folder / "nanoflow" / "1" / "engine.json").write_text(json.dumps(engine))
    return folder


def test_a_wrong_engine_json_is_one_line(tmp_path):
    model = DEMO_MODEL
    done = run("serve", "--model-repository", repository(tmp_path / "r", model=str(model), max_runing=3), *PORTS)
    assert_one_line(done, "model nanoflow: ")
    assert "r/nanoflow/1/engine.json: Object contains unknown field `max_runing`" in done.stderr


def test_a_copied_repository_says_where_it_looked_for_its_model(tmp_path):
    done = run("serve", "--model-repository", repository(tmp_path / "a" / "b" / "r"), *PORTS)
    assert_one_line(done, "engine.json: model (a relative path starts at this file's folder): ")
    assert f"{tmp_path}/a/b/demo/tiny-llama: there is no such folder" in done.stderr


def test_the_log_goes_on_and_its_warnings_are_shown(tmp_path):
    model, log = tmp_path / "model", tmp_path / "server.log"
    model.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(DEMO_MODEL / name, model)
    log.write_text("of yesterday\n")
    folder = repository(tmp_path / "r", model=str(model), schedule="auto", device="cpu")
    options = ("--model-repository", folder, "--log", log, "--log-format", "json", *PORTS)
    shown = tmp_path / "shown"
    with shown.open("w") as terminal:
        child = start("serve", *options, stdout=terminal, stderr=terminal)
    until(lambda: "schedule auto" in shown.read_text(), 60)
    child.send_signal(signal.SIGINT)
    assert child.wait(60) == 0
    warnings = [json.loads(line) for line in shown.read_text().splitlines() if line.startswith("{")]
    assert [line["message"].split(":")[0] for line in warnings] == [f"no tokenizer.json in {model}", "schedule auto"]
    assert {(line["level"], line["model"], line["instance"]) for line in warnings} == {
        ("WARNING", "nanoflow", "nanoflow_0_0")
    }
    kept = log.read_text()
    assert kept.startswith("of yesterday\n")
    assert all(json.dumps(line, separators=(",", ":")) in kept for line in warnings)
