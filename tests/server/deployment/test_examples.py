"""The examples run as their README says, and do what they say."""

import os
import re
import subprocess
import sys

import pytest
from support.places import ROOT

PYTHON = ".venv/bin/python"
KV_EVENTS = "kv_events.py"  # needs no server: tests/unit/engine/kv_events/test_example.py
COMMANDS = re.findall(
    rf"^(?:\.venv/bin/python )?examples/(?!{KV_EVENTS}).*", (ROOT / "examples" / "README.md").read_text(), re.MULTILINE
)
# What must be in the output. Sampling is greedy where it matters.
SAYS = {
    "grpc_stream.py": ["Write a string", "[length]"],
    "grpc_async.py": ["Write a string", "Return a list", "---"],
    "batch.py": ["Write a string", "Return a list", "---"],
    "http_generate.py": ["Write a string", "[length]", "[32 of 32 tokens]"],
    "token_ids.py": ["[", ", "],
    "cancel.py": ["[cancelled] after"],
    "load.py": ["64 of 64 requests", "output tokens/s"],
    "curl.sh": [
        "Write a string",
        '"finish_reason":"length"',
        '"batch_index":[0,1]',
        '"num_cancelled":0',
        "temperature: ",
    ],
}


def run(command, server):
    words = [word.strip('"') for word in re.findall(r'"[^"]*"|\S+', command)]
    url = server.grpc_url if "grpc" in command or "batch" in command or "load" in command else server.http_url
    words = [sys.executable if word == PYTHON else word for word in words]
    words += [url] if words[0].endswith(".sh") else ["--url", url]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120, env=os.environ)


def test_the_readme_names_them_all():
    files = {file.name for file in (ROOT / "examples").iterdir() if file.suffix in (".py", ".sh")}
    commands = {re.search(r"examples/(\S+)", command)[1] for command in COMMANDS}
    assert commands == files - {KV_EVENTS} == set(SAYS)


@pytest.mark.parametrize("command", COMMANDS)
def test_an_example_works(demo, command):
    result = run(command, demo)
    assert result.returncode == 0, result.stderr
    for text in SAYS[re.search(r"examples/(\S+)", command)[1]]:
        assert text in result.stdout


@pytest.mark.parametrize("file", ["grpc_stream.py", "http_generate.py"])
def test_a_client_shows_what_the_server_says(demo, file):
    result = run(f'{PYTHON} examples/{file} --prompt "{"word " * 3000}"', demo)
    assert result.returncode == 1
    assert "prompt: expected at most" in result.stderr
