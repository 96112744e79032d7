"""Workload holds the lengths of a benchmark's requests: constant, from a trace, or drawn as the paper draws them.

A WorkloadSpec names one before the engine is there whose limits it must fit.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import log, log1p, sqrt
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

from nanoflow_backend.bench.trace import read_trace
from nanoflow_backend.config.error import ConfigError

SEED = 0
TRACE_SEED = 1  # as another engine's figures for the Azure trace were drawn

# (mean, standard deviation) of input and of output tokens: the NanoFlow paper (OSDI'25), Table 4. The datasets
# themselves are others' texts; log-normal lengths have the same two moments, and the long tail of such texts.
DATASETS = {"lmsys-like": ((102, 169), (222, 210)), "sharegpt-like": ((246, 547), (322, 244))}
Dataset = Literal["lmsys-like", "sharegpt-like"]


@dataclass(frozen=True)
class Workload:
    """`lengths` are (input, output) tokens of each request; `facts` say in a result where they come from."""

    name: str
    lengths: tuple[tuple[int, int], ...]
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def input_tokens(self) -> int:
        return sum(length for length, _ in self.lengths)

    @property
    def output_tokens(self) -> int:
        return sum(length for _, length in self.lengths)

    def prompts(self, vocab_size: int, seed: int = SEED) -> Iterator[list[int]]:
        """Of another `seed` for each workload of one engine, so that none finds its prompts among cached pages."""
        return random_prompts((length for length, _ in self.lengths), vocab_size, seed)


class WorkloadSpec(NamedTuple):
    """What is asked for: lengths (input and output tokens; a trace's file; a dataset), and how many requests."""

    source: tuple[int, int] | Path | Dataset
    requests: int

    @classmethod
    def parse(cls, text: str) -> WorkloadSpec:
        """Read "1024/512:1500", "trace.csv:1800" or "lmsys-like:500".

        Raises:
            ConfigError: naming what was expected, or the file that is not there.
        """
        found = re.fullmatch(r"(?:([1-9]\d*)/([1-9]\d*)|(.+\.csv)|([a-z-]+)):([1-9]\d*)", text, re.ASCII)
        if found is None or (found[4] and found[4] not in DATASETS):
            raise ConfigError(
                f"--workload: expected LENGTHS:REQUESTS with PROMPT/OUTPUT tokens, a .csv trace or one of "
                f"{', '.join(DATASETS)}, such as 1024/512:1500, got {text!r}"
            )
        if found[3] and not Path(found[3]).is_file():
            raise ConfigError(f"--workload: {found[3]}: there is no such file")
        lengths = (int(found[1]), int(found[2])) if found[1] else Path(found[3]) if found[3] else None
        return cls(lengths or cast(Dataset, found[4]), int(found[5]))

    def read(self, max_model_tokens: int) -> Workload:
        """The workload, of requests that fit.

        Raises:
            ConfigError: see of_trace.
        """
        match self.source:
            case (input_tokens, output_tokens):
                return constant(input_tokens, output_tokens, self.requests)
            case Path():
                return of_trace(self.source, self.requests, max_model_tokens)
            case _:
                return drawn(self.source, self.requests, max_model_tokens)


def asked_for(
    workloads: Sequence[str], trace: Path | None, dataset: Dataset | None, lengths: tuple[int, int], requests: int
) -> list[WorkloadSpec]:
    """What the options of a benchmark's command line ask for.

    Raises:
        ConfigError: more than one of --workload, --trace and --dataset, or what WorkloadSpec.parse says.
    """
    if trace and dataset:
        raise ConfigError("--dataset: expected none beside --trace")
    if workloads and (trace or dataset):
        raise ConfigError(f"--workload: expected none beside {'--trace' if trace else '--dataset'}")
    if workloads:
        return [WorkloadSpec.parse(text) for text in workloads]
    return [WorkloadSpec(trace or dataset or lengths, requests)]


def random_prompts(lengths: Iterable[int], vocab_size: int, seed: int | str = SEED) -> Iterator[list[int]]:
    """Random ids, the same for every engine; no two prompts share a prefix worth caching."""
    draw, ids = random.Random(seed), range(vocab_size)
    for length in lengths:
        yield draw.choices(ids, k=length)


def constant(input_tokens: int, output_tokens: int, requests: int) -> Workload:
    return Workload(f"{input_tokens}/{output_tokens}", ((input_tokens, output_tokens),) * requests)


def of_trace(path: Path, requests: int, max_model_tokens: int) -> Workload:
    """So many rows of a trace (see read_trace), drawn from all of it: neighbours resemble each other.

    Raises:
        ConfigError: the file is no trace, or has no rows.
    """
    trace = read_trace(path, max_model_tokens)
    if not trace.lengths:
        raise ConfigError(f"{path}: expected a row with input and output tokens, found none")
    lengths = list(trace.lengths)
    random.Random(TRACE_SEED).shuffle(lengths)
    facts = {"trace_rows_dropped": trace.dropped_rows, "trace_rows_too_long": trace.too_long_rows}
    return Workload(path.stem, tuple(lengths[:requests]), facts)


def drawn(dataset: Dataset, requests: int, max_model_tokens: int) -> Workload:
    """Log-normal lengths with the dataset's means and deviations, at least 1.

    A request of more than `max_model_tokens` loses prompt tokens until one output token fits, then output tokens.
    """
    draw, lengths, clipped = random.Random(SEED), [], 0
    for _ in range(requests):
        asked_input, asked_output = (
            max(1, round(draw.lognormvariate(*log_moments(mean, deviation)))) for mean, deviation in DATASETS[dataset]
        )
        input_tokens = min(asked_input, max_model_tokens - 1)
        output_tokens = min(asked_output, max_model_tokens - input_tokens)
        clipped += (input_tokens, output_tokens) != (asked_input, asked_output)
        lengths.append((input_tokens, output_tokens))
    (input_mean, input_std), (output_mean, output_std) = DATASETS[dataset]
    facts = {
        "lengths_drawn": f"log-normal, in {input_mean} ± {input_std}, out {output_mean} ± {output_std}, seed {SEED}",
        "lengths_clipped": clipped,
    }
    return Workload(dataset, tuple(lengths), facts)


def log_moments(mean: float, deviation: float) -> tuple[float, float]:
    """Mean and deviation of the logarithm of what has this mean and deviation and is log-normal."""
    variance = log1p((deviation / mean) ** 2)
    return log(mean) - variance / 2, sqrt(variance)
