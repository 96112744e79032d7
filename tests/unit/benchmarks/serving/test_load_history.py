"""How old a gauge is, by the loads that the engine itself has kept."""

import pytest

from benchmarks.engine.load_history import LoadHistory, RecordingReporter


class Scheduler:
    def __init__(self):
        self.load, self.queue_room = (0, 0, 0), 9


@pytest.fixture
def history(tmp_path, monkeypatch):
    """Loads at 10, 11 ... s."""
    scheduler, now_s = Scheduler(), iter(range(10, 99))
    monkeypatch.setattr("benchmarks.engine.load_history.time.monotonic", lambda: next(now_s))
    reporter = RecordingReporter(lambda message: None, scheduler, tmp_path / "loads", tells=False)
    for load in ((1, 0, 2), (1, 1, 2), (1, 1, 2), (2, 0, 4), (1, 0, 2)):
        scheduler.load = load
        reporter.scheduled([])
        reporter.stepped([], has_work=True)
    return lambda column: LoadHistory(tmp_path / "loads", column)


@pytest.mark.parametrize(
    ("value", "asked_s", "answered_s", "age_s"),
    [
        (1, 10.5, 10.6, 0),  # true
        (1, 12.4, 12.6, 0.4),  # until 12
        (2, 11.9, 12.1, 0),  # true before the answer
        (2, 13.5, 13.6, 0.5),
        (1, 13.5, 13.6, 0),  # again
        (0, 10.3, 10.4, 0.3),  # before the first load
    ],
)
def test_an_age_is_how_long_a_value_was_not_true_any_more(history, value, asked_s, answered_s, age_s):
    assert history("running").age_s(value, asked_s, answered_s) == pytest.approx(age_s)


def test_only_changes_of_a_column_count(history):
    assert history("running").changes(0, 99) == 3
    assert history("waiting").changes(0, 99) == 2
    assert history("used_pages").changes(10.5, 99) == 2


def test_a_value_that_never_was_is_an_error(history):
    with pytest.raises(ValueError, match=r"7 was never true before 13\.6"):
        history("running").age_s(7, 13.5, 13.6)
