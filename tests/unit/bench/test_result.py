"""What a result says of the command that made it."""

import pytest

from nanoflow_backend.bench import result


@pytest.mark.parametrize(
    ("words", "command"),
    [
        (["/usr/bin/nanoflow", "bench", "offline"], "nanoflow bench offline"),
        (["/src/nanoflow_backend/__main__.py", "bench", "offline"], "nanoflow bench offline"),
        (["/src/benchmarks/__main__.py", "soak", "--output=/tmp/a.json"], "python -m benchmarks soak --output=a.json"),
        (["/src/benchmarks/__main__.py", "kernels", "--only", "a b"], "python -m benchmarks kernels --only 'a b'"),
    ],
)
def test_the_command_can_be_run_again_and_names_no_folder(monkeypatch, words, command):
    monkeypatch.setattr("sys.argv", words)
    assert result.header()["command"] == command
