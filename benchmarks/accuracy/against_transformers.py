"""One run of the engine is compared with transformers: a checkpoint, a way to run it, and what came out.

The engine's tokens are given to transformers in one forward pass per sequence. Where the argmax of every row is the
engine's next token, greedy decoding of both is the same, by induction; and the logits of all rows are compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.accuracy.relative_rms import relative_rms
from benchmarks.models.checkpoints import OWN_GRAPHS, make, save
from nanoflow_backend.engine import LLM, SamplingParams, program_builder, worker
from nanoflow_backend.runtime.binding import FittedPlan
from nanoflow_backend.runtime.cpu import CpuProgram
from nanoflow_backend.sampling.sampler import Sampler
from nanoflow_backend.scheduler.batch import Admission

MODELS = {
    "architecture": OWN_GRAPHS,
    "gqa_ratio": (1, 4, 8),
    "head_dim": (16, 64),
    "llama3_rope": (False, True),
    "tied": (False, True),
}
RUNS = {
    "schedule": ("sequential", "nano-batched-3"),
    "chunk_tokens": (1, 7, 64),
    "page_tokens": (4, 16, 64),
    "requests": (1, 20),
    "prefix_caching": (False, True),
    "tensor_parallel": (1, 2),
}
DENSE_BATCH_TOKENS, OUTPUT_TOKENS, SHARED_TOKENS = 64, 64, 70
NARROW_GAP = 1e-4  # between the reference's two best tokens, or the last chosen and first unchosen expert
TOLERANCE = 1e-4  # relative RMS of a row of logits


@dataclass
class ParityOutcome:
    """What one run showed. Rows are sampled tokens; excused ones follow a narrow gap of the reference."""

    rows: int = 0
    worst_logits: float = 0.0  # relative RMS error, of the rows that are not excused
    different_tokens: int = 0
    excused_rows: int = 0
    steps: int = 0  # of at least two tokens
    split_steps: int = 0  # of those, the ones with at least two non-empty nano-batches
    split_chunks: int = 0  # boundaries of nano-batches inside one request's tokens
    cached_tokens: int = 0
    failures: list[str] = field(default_factory=list)


def run(model: dict[str, Any], options: dict[str, Any], folder: Path) -> ParityOutcome:
    """Continue prompts[0] and then all prompts (the first again, so that its prefix is known) and compare."""
    reference, path = checkpoint(folder, **model)
    given = prompts(reference.config.vocab_size)[: options["requests"]]
    config = {name: value for name, value in options.items() if name != "requests"}
    outcome = ParityOutcome()
    greedy = SamplingParams(temperature=0, max_tokens=OUTPUT_TOKENS, ignore_eos=True)
    with recorded(outcome) as records:
        llm = LLM.from_pretrained(
            path, dense_batch_tokens=DENSE_BATCH_TOKENS, kv_cache_tokens=8192, max_running=20, **config
        )
        try:
            completions = llm.generate(given[:1], greedy) + llm.generate(given, greedy)
        finally:
            llm.close()
    outcome.cached_tokens = sum(c.num_cached_tokens for c in completions)
    for prompt, completion, logits in zip(given[:1] + given, completions, records, strict=True):
        if len(completion.token_ids) != OUTPUT_TOKENS:
            outcome.failures.append(f"{len(completion.token_ids)} tokens of {OUTPUT_TOKENS}")
        ours = torch.stack([logits[len(prompt) - 1 + i] for i in range(len(completion.token_ids))])
        compare_completion(reference, prompt, completion.token_ids, ours, outcome)
    return outcome


def compare_completion(
    reference: PreTrainedModel, prompt: list[int], output: list[int], ours: Tensor, outcome: ParityOutcome
) -> None:
    """Book in `outcome` how one completion and its logits [rows, V] differ from the reference's."""
    theirs, router_gap = reference_logits(reference, tuple(prompt + output[:-1]))
    for i, token in enumerate(output):
        row = theirs[len(prompt) - 1 + i]
        best, second = row.topk(2).values.tolist()
        error = relative_rms(ours[i], row)
        outcome.rows += 1
        if float(router_gap[len(prompt) - 1 + i]) < NARROW_GAP and error > TOLERANCE:
            outcome.excused_rows += 1  # another expert was as good: from here on the sequences are two
            continue
        outcome.worst_logits = max(outcome.worst_logits, error)
        if error > TOLERANCE:
            outcome.failures.append(f"output {i}: relative RMS error {error:.1e}")
        if token != int(row.argmax()):
            outcome.different_tokens += 1
            if best - second >= NARROW_GAP:
                outcome.failures.append(f"output {i}: token {token}, transformers has {int(row.argmax())}")


@lru_cache(4)
def checkpoint(
    folder: Path, architecture: str, gqa_ratio: int, head_dim: int, llama3_rope: bool, tied: bool
) -> tuple[PreTrainedModel, Path]:
    heads = 8
    model = make(
        architecture,
        heads=heads,
        kv_heads=heads // gqa_ratio,
        head_dim=head_dim,
        llama3_rope=llama3_rope,
        tie_word_embeddings=tied,
    )
    path = folder / f"{architecture}-{gqa_ratio}-{head_dim}-{llama3_rope}-{tied}"
    return model, path if path.exists() else save(model, path, max_shard_size="100KB")


@lru_cache
def prompts(vocab_size: int) -> list[list[int]]:
    """20 prompts of 1 to 100 tokens; every third one begins like the first."""
    random = Random(0)
    first = [random.randrange(vocab_size) for _ in range(SHARED_TOKENS + 5)]
    lengths = [random.randint(1, 100) for _ in range(20)]
    fresh = [[random.randrange(vocab_size) for _ in range(length)] for length in lengths]
    return [first if i == 0 else first[:SHARED_TOKENS] + p[:30] if i % 3 == 0 else p for i, p in enumerate(fresh)]


@lru_cache(256)
def reference_logits(model: PreTrainedModel, token_ids: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Logits [L, V], and for each row the narrowest router gap up to it [L] (infinite without experts)."""
    ids = torch.tensor([token_ids])
    moe = {"output_router_logits": True} if hasattr(model.config, "num_local_experts") else {}
    with torch.no_grad():
        output = model(ids, attention_mask=torch.ones_like(ids), **moe)
    gap = torch.full((len(token_ids),), torch.inf)
    for layer in output.router_logits if moe else ():
        ranked = layer.float().softmax(-1).sort(descending=True).values
        k = model.config.num_experts_per_tok
        gap = torch.minimum(gap, ranked[:, k - 1] - ranked[:, k])
    return output.logits[0], gap.cummin(0).values


@contextmanager
def recorded(outcome: ParityOutcome) -> Iterator[list[dict[int, Tensor]]]:
    """While this lasts, engines keep each request's logits by position, and count their nano-batches."""
    records: list[dict[int, Tensor]] = []  # position of the token that was read -> logits
    by_slot: dict[int, dict[int, Tensor]] = {}

    class RecordingSampler(Sampler):
        def admit(self, admissions: Iterable[Admission]) -> None:
            super().admit(admissions)
            for admission in admissions:
                by_slot[admission.slot] = {}
                records.append(by_slot[admission.slot])

        def sample(self, logits: Tensor, slots: Sequence[int], positions: Sequence[int], masks: Any = None) -> Any:
            for row, (slot, position) in enumerate(zip(slots, positions, strict=True)):
                by_slot[slot][position] = logits[row].clone()
            return super().sample(logits, slots, positions, masks)

    class RecordingProgram(CpuProgram):
        def forward(
            self, plan: FittedPlan, token_ids: Tensor, positions: Tensor, slots: Tensor, page_table: Tensor
        ) -> None:
            ranges = {r for r in plan.bound.schedule.fit(plan.tokens) if r[0] < r[1]}
            if len(slots) >= 2:
                outcome.steps += 1
                outcome.split_steps += len(ranges) >= 2
            outcome.split_chunks += sum(int(slots[start - 1] == slots[start]) for start, _ in ranges if start)
            super().forward(plan, token_ids, positions, slots, page_table)

    worker.Sampler, program_builder.CpuProgram = RecordingSampler, RecordingProgram
    try:
        yield records
    finally:
        worker.Sampler, program_builder.CpuProgram = Sampler, CpuProgram
