"""simulate runs requests of known lengths through the scheduler, on a device that only pretends."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from nanoflow_backend.bench.pretend.engine import WORD, PretendClock, PretendEngine
from nanoflow_backend.bench.trace import Trace
from nanoflow_backend.request.request import Request
from nanoflow_backend.request.sampling_params import SamplingParams
from nanoflow_backend.scheduler.batch import Batch, FinishReason, Sampled
from nanoflow_backend.scheduler.scheduler import Scheduler

EOS = 0


@dataclass(frozen=True)
class SimulationResult:
    """Shares are of the dense batch and of all pages; means are over the steps."""

    requests: int
    steps: int
    simulated_s: float
    wall_s: float
    input_tokens: int
    output_tokens: int
    computed_tokens: int  # in all batches
    recomputed_tokens: int  # of these, computed before and lost by preemption
    overshoot_tokens: int  # of these, decoded after an EOS that was not known yet
    preemptions: int
    dense_fill_mean: float
    dense_fill_mean_while_waiting: float  # over the steps that left requests waiting
    running_requests_mean: float
    page_use_mean: float
    page_use_peak: float


class _Program:
    """Samples EOS where a request has reached its output length, and a word before. It knows a request by its seed."""

    def __init__(self, output_tokens: list[int], slots: int) -> None:
        self._output_tokens = output_tokens
        self._eos_positions = np.zeros(slots, np.int64)  # by slot: the position whose row gives the EOS

    def run(self, batch: Batch) -> Sampled:
        """Return what a step samples, at once."""
        for slot, prompt_tokens, params in ((a.slot, a.prompt_tokens, a.params) for a in batch.admitted):
            assert params.seed is not None
            self._eos_positions[slot] = prompt_tokens + self._output_tokens[params.seed] - 2
        positions = batch.decode_positions + [p.start + len(p.token_ids) - 1 for p in batch.prefills if p.sample]
        ends = np.array(positions, np.int64) == self._eos_positions[batch.sampled_slots]
        return Sampled(batch.step, np.where(ends, EOS, WORD).tolist())


def simulate(
    trace: Trace,
    scheduler: Scheduler,
    *,
    dense_batch_tokens: int,
    max_running: int,
    max_tokens: int | None,
    step_s: Callable[[Batch], float] | None = None,
) -> SimulationResult:
    """Run all requests to their end. Every one asks for `max_tokens` and ends, unknown to the scheduler, by EOS; with
    None each asks for the tokens that it gets.

    `scheduler` is fresh, with EOS 0 and room for all in its queue. `step_s` is the time that a step takes; without it
    no time passes, and all requests arrive at once. Results come back one step late, as in the engine.

    Raises:
        RuntimeError: a request did not end by its EOS, or the scheduler has work and runs nothing.
    """
    program = _Program([output for _, output in trace.lengths], max_running)
    arrivals = deque(sorted(range(len(trace.lengths)), key=trace.arrivals_s.__getitem__))
    fills: list[int] = []
    left_waiting: list[bool] = []
    running: list[int] = []
    used_pages: list[int] = []

    def run(batch: Batch) -> Sampled:
        stats = scheduler.stats
        fills.append(batch.tokens)
        left_waiting.append(stats.waiting_requests > 0)
        running.append(stats.running_requests)
        used_pages.append(stats.used_pages)
        return program.run(batch)

    clock, ended = PretendClock(), 0
    engine = PretendEngine(scheduler, step_s or (lambda batch: 0.0), clock, run)
    start_s = time.perf_counter()
    while arrivals or engine.has_work:
        while arrivals and (step_s is None or trace.arrivals_s[arrivals[0]] <= clock()):
            index = arrivals.popleft()
            input_tokens, output_tokens = trace.lengths[index]
            params = SamplingParams(max_tokens=max_tokens or output_tokens, seed=index)
            engine.add(Request(index, [WORD] * input_tokens, params))
        if not engine.has_work:
            clock.now_s = trace.arrivals_s[arrivals[0]]
            continue
        for delta in engine.step():
            if delta.finish_reason is not None:
                ended += 1
                if delta.finish_reason != FinishReason.STOP:
                    raise RuntimeError(f"request {delta.request_id} ended by {delta.finish_reason}, expected its EOS")
    stats = scheduler.stats
    input_tokens, output_tokens = (sum(tokens) for tokens in zip(*trace.lengths, strict=True))
    needed_tokens = input_tokens + output_tokens - len(trace.lengths)  # nobody reads the last one
    fill = np.array(fills) / dense_batch_tokens
    return SimulationResult(
        requests=ended,
        steps=stats.steps,
        simulated_s=clock(),
        wall_s=time.perf_counter() - start_s,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        computed_tokens=sum(fills),
        recomputed_tokens=sum(fills) - needed_tokens - stats.overshoot_tokens + stats.prefix_hit_tokens,
        overshoot_tokens=stats.overshoot_tokens,
        preemptions=stats.preemptions,
        dense_fill_mean=float(fill.mean()),
        dense_fill_mean_while_waiting=float(fill[left_waiting].mean()) if any(left_waiting) else float("nan"),
        running_requests_mean=float(np.mean(running)),
        page_use_mean=float(np.mean(used_pages)) / stats.num_pages,
        page_use_peak=max(used_pages) / stats.num_pages,
    )
