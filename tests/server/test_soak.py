"""A short soak; benchmarks/soak.py is the long one."""

import pytest
import soak_run

pytestmark = pytest.mark.server


def test_overload_kills_and_reloads_lose_no_request():
    report = soak_run.run(seconds=0, round_s=3, seed=1, say=print)
    # What a busy machine may change is for the long run, whose machine is quiet.
    ours = [failure for failure in report["failures"] if not failure.startswith("p99 of refusals")]
    assert ours == []
    assert [(r["event"], r["cancels"]) for r in report["rounds"]] == [
        (None, False),
        ("kill_engine", False),
        ("reload", False),
        (None, True),
        ("kill_engine", True),
    ]
    assert len(report["recoveries_s"]) == 2
