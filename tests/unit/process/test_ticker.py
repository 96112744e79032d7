"""A ticker calls by its period, at once when woken, and never again after its stop."""

from __future__ import annotations

import threading

from nanoflow_backend.process.ticker import Ticker


def test_a_ticker_that_is_woken_does_not_wait_for_its_period() -> None:
    called = threading.Semaphore(0)
    ticker = Ticker("slow", 3600.0, called.release)
    for _ in range(3):
        ticker.wake()
        assert called.acquire(timeout=30)
    ticker.stop(30)
    ticker.wake()
    assert not called.acquire(timeout=0.05)


def test_a_ticker_outlives_what_it_calls_and_goes_on_by_its_period() -> None:
    calls: list[int] = []
    enough = threading.Event()

    def broken() -> None:
        calls.append(1)
        if len(calls) == 3:
            enough.set()
        raise ValueError("no")

    ticker = Ticker("broken", 0.001, broken)
    assert enough.wait(30)
    ticker.stop(30)
