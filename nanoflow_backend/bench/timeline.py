"""Timeline is an offline run as it went, sampled about once a second; it finds the part that was stationary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise, takewhile
from math import ceil
from typing import Any

from nanoflow_backend.runtime.gpu_meter import GpuReading
from nanoflow_backend.scheduler.batch import Batch
from nanoflow_backend.scheduler.stats import SchedulerStats

# Requests that come at once start in step with each other. After so many mean residences that is forgotten.
GENERATIONS = 2
STEADY_S = 60.0  # that the stationary part must last to count
MARGIN = 1.1  # on the advice: how many requests make it last so long


@dataclass
class Counts:
    """Of all steps so far. What a preemption computes again counts again."""

    steps: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    sampled_rows: int = 0
    kv_tokens_read: int = 0  # by decodes: the tokens before each and itself
    attended_pairs: int = 0  # (query token, key token), those of prefills too
    page_steps: int = 0  # pages that requests hold, summed over the steps

    def add(self, batch: Batch, used_pages: int) -> None:
        """Count one step that was launched while requests held `used_pages` pages."""
        decodes = len(batch.decode_slots)
        context = sum(batch.decode_positions) + decodes
        self.steps += 1
        self.decode_tokens += decodes
        self.sampled_rows += decodes
        self.kv_tokens_read += context
        self.attended_pairs += context
        for prefill in batch.prefills:
            new = len(prefill.token_ids)
            self.prefill_tokens += new
            self.sampled_rows += prefill.sample
            self.attended_pairs += new * prefill.start + new * (new + 1) // 2
        self.page_steps += used_pages

    @property
    def tokens(self) -> int:
        return self.prefill_tokens + self.decode_tokens

    def since(self, earlier: Counts) -> Counts:
        return Counts(*(getattr(self, field.name) - getattr(earlier, field.name) for field in fields(self)))


@dataclass(frozen=True)
class Sample:
    """A moment of a run. Counts are from its start."""

    time_s: float  # of time.perf_counter()
    counts: Counts
    output_tokens: int  # that the host has seen
    peak_pages: int  # since the sample before
    stats: SchedulerStats
    gpu: GpuReading | None


@dataclass(frozen=True)
class Timeline:
    """What each second of a run processed, and what the GPU drew meanwhile."""

    samples: Sequence[Sample]
    dense_batch_tokens: int

    @property
    def wall_s(self) -> float:
        return self.samples[-1].time_s - self.samples[0].time_s

    @property
    def counts(self) -> Counts:
        return self.samples[-1].counts.since(self.samples[0].counts)

    def rates(self, tokens: int) -> dict[str, Any]:
        """From the first sample to the last, in which `tokens` were processed."""
        first, last, counts = self.samples[0], self.samples[-1], self.counts
        outputs = last.output_tokens - first.output_tokens
        num_pages = last.stats.num_pages
        found = {
            "wall_s": round(self.wall_s, 3),
            "output_tokens": outputs,
            "total_tokens_per_s": round(tokens / self.wall_s, 1),
            "output_tokens_per_s": round(outputs / self.wall_s, 1),
        }
        if first.gpu and last.gpu:
            energy_j = last.gpu.energy_j - first.gpu.energy_j
            found["mean_power_w"] = round(energy_j / (last.gpu.time_s - first.gpu.time_s), 1)
            found["mj_per_token"] = round(1e3 * energy_j / tokens, 3)
            found["mean_sm_clock_mhz"] = round(
                sum(s.gpu.sm_clock_mhz for s in self.samples if s.gpu) / len(self.samples)
            )
        return found | {
            "steps": counts.steps,
            "dense_batch_fill": round(counts.tokens / (counts.steps * self.dense_batch_tokens), 4),
            "kv_use_mean": round(counts.page_steps / (counts.steps * num_pages), 4),
            "kv_use_max": round(max(sample.peak_pages for sample in self.samples[1:]) / num_pages, 4),
            "preemptions": last.stats.preemptions - first.stats.preemptions,
        }

    def steady(self) -> Timeline | str:
        """The part whose mix is stationary: after GENERATIONS mean residences of a request, while others wait.

        Text instead, if it is shorter than STEADY_S: why, and how many requests would do.
        """
        first, last = self.samples[0], self.samples[-1]
        running = sum(b.stats.running_requests * (b.time_s - a.time_s) for a, b in pairwise(self.samples))
        residence_s = running / max(last.stats.finished_requests - first.stats.finished_requests, 1)
        queued = list(takewhile(lambda sample: sample.stats.waiting_requests, self.samples))
        window = [sample for sample in queued if sample.time_s - first.time_s >= GENERATIONS * residence_s]
        if len(window) > 1 and window[-1].time_s - window[0].time_s >= STEADY_S:
            return Timeline(window, self.dense_batch_tokens)
        if not residence_s:
            return f"too short: the run took {self.wall_s:.1f} s"
        queued_s = queued[-1].time_s - first.time_s if queued else 0.0
        most = max(sample.stats.running_requests for sample in self.samples)
        needed = MARGIN * most * (GENERATIONS + STEADY_S / residence_s)
        return (
            f"too short: requests waited for {queued_s:.1f} s, expected {GENERATIONS} mean residences of a request "
            f"({residence_s:.1f} s each) and {STEADY_S:.0f} s more; --requests {ceil(needed / 100) * 100} should do"
        )

    def points(self) -> list[dict[str, Any]]:
        """For a result: what each sample brought since the one before."""
        return [_point(before, after, self.samples[0].time_s) for before, after in pairwise(self.samples)]


def _point(before: Sample, after: Sample, start_s: float) -> dict[str, Any]:
    counts, wall_s = after.counts.since(before.counts), after.time_s - before.time_s
    found = {
        "at_s": round(after.time_s - start_s, 2),
        "wall_s": round(wall_s, 4),
        "total_tokens_per_s": round(counts.tokens / wall_s),
        "steps": counts.steps,
        "prefill_tokens": counts.prefill_tokens,
        "decode_tokens": counts.decode_tokens,
        "sampled_rows": counts.sampled_rows,
        "kv_tokens_read": counts.kv_tokens_read,
        "attended_pairs": counts.attended_pairs,
        "running": after.stats.running_requests,
        "waiting": after.stats.waiting_requests,
        "used_pages": after.stats.used_pages,
    }
    if before.gpu and after.gpu:
        found["power_w"] = round((after.gpu.energy_j - before.gpu.energy_j) / (after.gpu.time_s - before.gpu.time_s))
        found["sm_clock_mhz"] = after.gpu.sm_clock_mhz
        found["gpu_percent"] = after.gpu.gpu_percent
        found["memory_percent"] = after.gpu.memory_percent
    return found
