"""Log lines: what each has, in both forms, and who chooses."""

import json
import logging
import re

import pytest
from support.commands.command_line import log_as_it_was

from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.process import logs

TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"
log = logging.getLogger("nanoflow_backend.engine.any")


@pytest.fixture(autouse=True)
def own_log(monkeypatch):
    for variable in (logs.LEVEL, logs.FORMAT, logs.ORIGIN):
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)
    with log_as_it_was():
        yield


def fail_with_a_trace():
    try:
        raise KeyError("k")
    except KeyError:
        log.exception("it broke")


def test_a_line_has_time_level_model_and_instance(capsys):
    logs.name_origin("llama", "llama_0_1")
    logs.configure()
    log.warning("page %d", 7)
    log.debug("not asked for")
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(rf"{TIME} WARNING model=llama instance=llama_0_1 nanoflow_backend\.engine\.any: page 7", line)


def test_without_a_server_there_is_no_model(capsys):
    logs.configure()
    log.info("a")
    assert re.fullmatch(rf"{TIME} INFO nanoflow_backend\.engine\.any: a\n", capsys.readouterr().err)


def test_json_has_an_object_a_line_traces_included(capsys, monkeypatch):
    monkeypatch.setenv(logs.FORMAT, "json")
    logs.name_origin("llama", "llama_0_1")
    logs.configure(logging.NullHandler())  # a server's log has a form of its own
    log.info('say "hi"\nand go')
    fail_with_a_trace()
    said, broke = map(json.loads, capsys.readouterr().err.splitlines())
    assert re.fullmatch(TIME, said.pop("time"))
    assert said.pop("pid") > 0
    assert said == {
        "level": "INFO",
        "model": "llama",
        "instance": "llama_0_1",
        "logger": "nanoflow_backend.engine.any",
        "message": 'say "hi"\nand go',
    }
    assert (broke["level"], broke["message"]) == ("ERROR", "it broke")
    assert broke["exception"].endswith("KeyError: 'k'")


def test_a_trace_follows_its_line(capsys):
    logs.configure()
    fail_with_a_trace()
    assert "it broke\nTraceback (most recent call last):" in capsys.readouterr().err


@pytest.mark.parametrize(("level", "seen"), [("debug", "DIWE"), ("INFO", "IWE"), ("warning", "WE"), ("error", "E")])
def test_the_level_is_that_of_the_environment(capsys, monkeypatch, level, seen):
    monkeypatch.setenv(logs.LEVEL, level)
    logs.configure(level="warning")
    for say in (log.debug, log.info, log.warning, log.error):
        say("x")
    assert "".join(line.split()[1][0] for line in capsys.readouterr().err.splitlines()) == seen


@pytest.mark.parametrize("variable", [logs.LEVEL, logs.FORMAT])
def test_a_value_that_means_nothing_is_named(monkeypatch, variable):
    monkeypatch.setenv(variable, "loud")
    with pytest.raises(ConfigError, match=rf"{variable}: expected one of .*, got 'loud'"):
        logs.configure()
