"""The one command line of the benchmarks."""

import re
import subprocess
import sys
from importlib import import_module

import pytest
from support.places import ROOT

from benchmarks.__main__ import ROOMS

COMMANDS = [command for commands in ROOMS.values() for command in commands]


def run(*words):
    return subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_help_lists_every_command_and_imports_none():
    listed = run("-X", "importtime", "-m", "benchmarks", "--help")
    assert listed.returncode == 0
    assert all(command.name in listed.stdout for command in COMMANDS)
    assert "benchmarks.kernels" not in listed.stderr
    assert "torch" not in listed.stderr
    assert "numpy" not in listed.stderr


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_a_command_says_what_it_does(command):
    assert import_module(f"benchmarks.{command.module}").main.__doc__


def test_the_options_are_those_of_the_command():
    asked = run("-m", "benchmarks", "kernels", "--help")
    assert asked.returncode == 0
    assert "Usage: python -m benchmarks kernels" in asked.stdout
    assert "--duration-s" in asked.stdout


def test_bad_input_is_named_without_a_traceback(tmp_path):
    profile = ROOT / "benchmarks" / "schedules" / "profile_llama3_8b_h200.json"
    words = ("--model", "benchmarks/models/llama-3-8b", "--profile", profile, "--output", tmp_path / "map.json")
    refused = run("-m", "benchmarks", "overlap-sensitivity", *words, "--tokens", "1000")
    assert refused.returncode == 1
    assert refused.stderr == "benchmarks: dense-batch-tokens: expected a multiple of 128 from 256 on, got 1000\n"


def test_the_readme_has_every_command():
    page = (ROOT / "benchmarks" / "README.md").read_text()
    missing = [c.name for c in COMMANDS if not re.search(rf"`(python -m benchmarks |make )?{c.name}[ `]", page)]
    assert missing == []
