"""Arrivals say when the requests of an open loop are due, and how long they are: the same for every engine."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from nanoflow_backend.bench.trace import read_trace
from nanoflow_backend.bench.workload import Dataset, WorkloadSpec, random_prompts
from nanoflow_backend.config.error import ConfigError

Kind = Literal["poisson", "trace"]


@dataclass(frozen=True)
class Arrivals:
    """Requests in the order in which they are due.

    Those due in the first `warm_up_s` seconds bring the engine to its load, and those of the last `warm_up_s` keep it
    there while the ones between them, which are measured, come to their ends.
    """

    rate: float  # requests a second
    warm_up_s: float
    duration_s: float  # in which those are due that are measured
    due_s: tuple[float, ...]  # since the start
    lengths: tuple[tuple[int, int], ...]  # input and output tokens
    seed: int
    facts: Mapping[str, Any] = field(default_factory=dict)  # for a result: where the lengths come from

    @property
    def measured(self) -> range:
        """Their places."""
        until_s = self.warm_up_s + self.duration_s
        before = sum(due_s < self.warm_up_s for due_s in self.due_s)
        return range(before, sum(due_s < until_s for due_s in self.due_s))

    def prompts(self, vocab_size: int) -> Iterator[list[int]]:
        """Others for each rate and seed: nothing of them is in a prefix cache."""
        lengths = (input_tokens for input_tokens, _ in self.lengths)
        return random_prompts(lengths, vocab_size, f"prompts {self.seed} {self.rate:g}")


@dataclass(frozen=True)
class Load:
    """What is asked of an open loop, as its options say it. `lengths`: as of a WorkloadSpec.

    `rates` are requests a second. Arrivals are Poisson's, or those of the trace: stretched to a rate, or at their own
    where none is given.
    """

    rates: tuple[float, ...]
    warm_up_s: float
    duration_s: float
    lengths: tuple[int, int] | Path | Dataset
    kind: Kind = "poisson"
    seed: int = 0

    def check(self) -> None:
        """Raises: ConfigError, naming an option that does not go with the others, or a rate or time out of range."""
        if self.kind == "trace" and not isinstance(self.lengths, Path):
            raise ConfigError("--arrivals trace: expected --trace, the file that has them")
        if self.kind == "poisson" and not self.rates:
            raise ConfigError("--rate: expected requests a second")
        for option, value in (*(("--rate", rate) for rate in self.rates), ("--duration", self.duration_s)):
            if not 0 < value < float("inf"):
                raise ConfigError(f"{option}: expected a number above 0, got {value:g}")
        if not 0 <= self.warm_up_s < float("inf"):
            raise ConfigError(f"--warm-up: expected seconds, 0 or more, got {self.warm_up_s:g}")

    def arrivals(self, max_model_tokens: int) -> list[Arrivals]:
        """For each rate. A trace may not have a request of more than `max_model_tokens`: it is left out, and counted.

        Raises:
            ConfigError: the trace is shorter than what is asked for, or no request would be measured.
        """
        self.check()
        if self.kind == "trace":
            found = [self._replayed(rate, max_model_tokens) for rate in self.rates or (None,)]
        else:
            found = [self._drawn(rate, max_model_tokens) for rate in self.rates]
        for arrivals in found:
            if not arrivals.measured:
                raise ConfigError(
                    f"--duration {self.duration_s:g}: expected time for a request at {arrivals.rate:g} a second"
                )
        return found

    @property
    def workload(self) -> str:
        """Its name, as of a Workload."""
        match self.lengths:
            case (input_tokens, output_tokens):
                return f"{input_tokens}/{output_tokens}"
            case Path():
                return self.lengths.stem
            case _:
                return self.lengths

    def facts(self) -> dict[str, Any]:
        """For a result."""
        arrivals = f"Poisson, seed {self.seed}" if self.kind == "poisson" else "of the trace"
        return {
            "workload": self.workload,
            "arrivals": arrivals,
            "warm_up_s": self.warm_up_s,
            "duration_s": self.duration_s,
        }

    @property
    def _until_s(self) -> float:
        return self.duration_s + 2 * self.warm_up_s

    def _drawn(self, rate: float, max_model_tokens: int) -> Arrivals:
        draw, due_s, at_s = random.Random(f"arrivals {self.seed} {rate:g}"), list[float](), 0.0
        while (at_s := at_s + draw.expovariate(rate)) < self._until_s:
            due_s.append(at_s)
        work = WorkloadSpec(self.lengths, len(due_s)).read(max_model_tokens)
        if len(work.lengths) < len(due_s):
            raise ConfigError(
                f"{self.lengths}: expected {len(due_s)} rows for {self._until_s:g} s at {rate:g} a second, "
                f"found {len(work.lengths)}"
            )
        return self._made(rate, due_s, work.lengths, work.facts)

    def _replayed(self, rate: float | None, max_model_tokens: int) -> Arrivals:
        assert isinstance(self.lengths, Path), "checked"
        trace = read_trace(self.lengths, max_model_tokens)
        last_s = trace.arrivals_s[-1] if trace.arrivals_s else 0.0
        if not last_s:
            raise ConfigError(f"{self.lengths}: expected requests at different times, found {len(trace.lengths)} rows")
        own_rate = len(trace.arrivals_s) / last_s
        stretch = 1.0 if rate is None else own_rate / rate
        if last_s * stretch < self._until_s:
            raise ConfigError(
                f"{self.lengths}: expected {self._until_s:g} s of arrivals (--duration and twice --warm-up), "
                f"at this rate it has {last_s * stretch:.1f} s"
            )
        due_s = [at_s * stretch for at_s in trace.arrivals_s if at_s * stretch < self._until_s]
        facts = {"trace_rows_dropped": trace.dropped_rows, "trace_rows_too_long": trace.too_long_rows}
        return self._made(own_rate if rate is None else rate, due_s, trace.lengths[: len(due_s)], facts)

    def _made(
        self, rate: float, due_s: Sequence[float], lengths: Sequence[tuple[int, int]], facts: Mapping[str, Any]
    ) -> Arrivals:
        return Arrivals(rate, self.warm_up_s, self.duration_s, tuple(due_s), tuple(lengths), self.seed, facts)
