"""BatchProgress: what stands beside the bar."""

import io
from types import SimpleNamespace

from rich.console import Console

from nanoflow_backend.commands.batch_progress import BatchProgress


def test_rates_are_of_this_run_and_the_end_is_foreseen():
    seconds = [100.0]
    results = SimpleNamespace(lines=50, failed=1, tokens=0)  # of a run before
    progress = BatchProgress(1050, results, Console(file=io.StringIO()), clock=lambda: seconds[0])
    assert progress.text() == "0.0 lines/s, 0 tokens/s, 1 failed"
    seconds[0] += 10
    results.lines, results.tokens, results.failed = 150, 45_678, 3
    assert progress.text() == "10.0 lines/s, 4,568 tokens/s, 3 failed, 0:01:30 left"


def test_what_is_shown_has_all_of_it():
    shown = io.StringIO()
    results = SimpleNamespace(lines=0, failed=0, tokens=0)
    with BatchProgress(4, results, Console(file=shown, width=120)) as progress:
        results.lines, results.failed = 3, 2
        progress.update()
    assert "3/4" in shown.getvalue()
    assert "2 failed" in shown.getvalue()


def test_without_a_total_no_end_is_foreseen():
    seconds, results = [0.0], SimpleNamespace(lines=0, failed=0, tokens=0)
    progress = BatchProgress(None, results, Console(file=io.StringIO()), clock=lambda: seconds[0])
    seconds[0], results.lines = 2.0, 8
    assert progress.text() == "4.0 lines/s, 0 tokens/s, 0 failed"
