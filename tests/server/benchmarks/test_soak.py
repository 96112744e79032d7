"""A short soak; `make soak` is the long one."""

import pytest

from benchmarks.stress import soak


def test_overload_kills_stalls_and_reloads_lose_no_request():
    report = soak.soak(duration_s=0, round_s=1.5, seed=1, say=print)
    # What a busy machine may change is for the long run, whose machine is quiet.
    ours = [failure for failure in report["failures"] if not failure.startswith(("p99 of refusals", "late: "))]
    assert ours == []
    assert [(r["event"], r["cancels"]) for r in report["rounds"]] == [
        (None, False),
        ("kill_engine", False),
        ("reload", False),
        ("pause_engine", False),
        ("stall_engine", False),
        (None, True),
        ("kill_engine", True),
    ]
    assert (len(report["recoveries_s"]), len(report["stalls_s"])) == (2, 1)
    assert report["ends"]["slow: answered"]


@pytest.mark.parametrize(
    ("lost", "departures", "is_failure"),
    [(0, 0, False), (1, 0, True), (8, 290, False), (31, 290, True)],
)
def test_lost_sockets_are_excused_only_as_far_as_clients_left(lost, departures, is_failure):
    rounds = [{"round": 0, "held": {"lost_sockets": lost}, "departures": departures}]
    assert bool(list(soak.lost_too_much(rounds))) is is_failure
