from pathlib import Path

import pytest

from nanoflow_backend.bench.reservation import ReserveMaxTokens, ReserveNothing
from nanoflow_backend.bench.simulator import EOS, SimulationResult, simulate
from nanoflow_backend.bench.trace import Trace, read_trace
from nanoflow_backend.scheduler.forecast.length_forecast import LengthForecast
from nanoflow_backend.scheduler.limits import SchedulerLimits
from nanoflow_backend.scheduler.scheduler import Scheduler

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


def test_rows_are_read_or_counted(tmp_path: Path) -> None:
    file = tmp_path / "trace.csv"
    rows = ("00.5000000,374,44", "02.7500000,0,7", "03.0000000,5,0", "04.5000000,150,80", "04.5000000,900,80")
    file.write_text(HEADER + "".join(f"2023-11-16 18:15:{row}\n" for row in rows), encoding="utf-8-sig")
    assert read_trace(file, max_model_tokens=420) == Trace(
        lengths=((374, 44), (150, 80)), arrivals_s=(0.0, 4.0), dropped_rows=2, too_long_rows=1
    )


def test_what_is_no_trace_is_named(tmp_path: Path) -> None:
    file = tmp_path / "trace.csv"
    file.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"trace\.csv: expected the columns ContextTokens, GeneratedTokens, TIMESTAMP"):
        read_trace(file, 100)
    file.write_text(HEADER + "2023-11-16 18:15:46.68,many,1\n")
    with pytest.raises(ValueError, match=r"trace\.csv, line 2: expected a time and two counts"):
        read_trace(file, 100)


def simulated(
    forecast: LengthForecast | ReserveMaxTokens | ReserveNothing, trace: Trace, num_pages: int, step_s: float = 0.0
) -> SimulationResult:
    limits = SchedulerLimits(
        dense_batch_tokens=64,
        chunk_tokens=64,
        prompt_tokens=64,
        max_running=32,
        max_queue_size=len(trace.lengths),
        num_pages=num_pages,
        page_tokens=8,
        max_model_tokens=400,
    )
    scheduler = Scheduler(
        limits,
        eos_token_ids=[EOS],
        prefix_caching=False,
        forecast=forecast,
    )
    takes = (lambda batch: step_s) if step_s else None
    return simulate(trace, scheduler, dense_batch_tokens=64, max_running=32, max_tokens=200, step_s=takes)


def test_a_simulation_accounts_for_every_token() -> None:
    trace = Trace(((100, 3), (10, 50), (1, 1)), (0.0, 0.0, 30.0))
    result = simulated(LengthForecast(), trace, num_pages=100, step_s=0.5)
    assert (result.requests, result.input_tokens, result.output_tokens) == (3, 111, 54)
    assert result.computed_tokens == 111 + 54 - 3 + result.overshoot_tokens
    assert result.overshoot_tokens == 3
    assert (result.recomputed_tokens, result.preemptions) == (0, 0)
    assert result.simulated_s == 31.0, "the last request came at 30 s, and took a step and its overshoot"


def test_the_forecast_admits_more_than_caution_and_wastes_less_than_hope() -> None:
    trace = Trace(tuple((20 + i % 13, 20 + i * 37 % 101) for i in range(400)), (0.0,) * 400)
    forecast, hope, caution = (
        simulated(arm, trace, num_pages=100) for arm in (LengthForecast(), ReserveNothing(), ReserveMaxTokens())
    )
    assert caution.preemptions == 0
    assert forecast.preemptions < hope.preemptions / 4
    assert forecast.recomputed_tokens < hope.recomputed_tokens / 4
    assert forecast.steps < 0.7 * caution.steps
