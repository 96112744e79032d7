"""Worker: one rank's weights, pages and program; turns a Batch into device inputs and samples into ids.

T tokens of the batch, R rows that are sampled.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed

from nanoflow_backend.config import EngineConfig, ModelConfig
from nanoflow_backend.engine.sampling import Sampler
from nanoflow_backend.kvcache import storage
from nanoflow_backend.models import weights
from nanoflow_backend.models.model import build
from nanoflow_backend.runtime.collectives import Collectives
from nanoflow_backend.runtime.cpu import CpuProgram
from nanoflow_backend.schedule.source import find_schedule
from nanoflow_backend.scheduler.batch import Batch, Sampled, TokenLogprobs


@dataclass
class Launched:
    """A step on its way: its batch, the rows that it samples, and, after the tail, what came out."""

    batch: Batch
    rows: torch.Tensor  # int64 [R], into the batch's tokens
    positions: torch.Tensor  # int64 [R], of the tokens that are sampled
    token_ids: torch.Tensor | None = None  # int64 [R]
    logprobs: dict[int, TokenLogprobs] | None = None


class Worker:
    """One rank out of `config.tensor_parallel`. Every rank launches the same batches in the same order."""

    def __init__(self, config: EngineConfig, model_config: ModelConfig, max_model_tokens: int, rank: int = 0) -> None:
        tp, dtype = config.tensor_parallel, getattr(torch, config.dtype)
        model = build(model_config, tp)
        schedule = find_schedule(config, model)
        loaded = weights.load(Path(config.model), model_config, model, rank=rank, tp=tp, dtype=dtype)
        num_slots, page_tokens = config.max_running or config.dense_batch_tokens, config.page_tokens
        num_pages = -(-config.kv_cache_tokens // page_tokens)
        self._program = CpuProgram(
            model,
            schedule,
            loaded,
            storage.allocate(model_config, tp, num_pages, page_tokens, dtype),
            Collectives(tp),
            max_tokens=config.dense_batch_tokens,
            dtype=dtype,
        )
        self._sampler = Sampler(num_slots, model_config.vocab_size, model_config.eos_token_ids)
        self._page_table = torch.zeros(num_slots, -(-max_model_tokens // page_tokens), dtype=torch.int32)
        # The last sampled id of each slot: the next step reads its decode inputs here, the host sees them later.
        self._last_sampled = torch.zeros(num_slots, dtype=torch.int64)

    def launch_forward(self, batch: Batch) -> Launched:
        """Embedding and layers on all T tokens."""
        for admission in batch.admitted:
            self._sampler.admit(admission)
        if batch.page_table:
            slots, indices, pages = torch.tensor(batch.page_table).T
            self._page_table[slots, indices] = pages.to(torch.int32)

        decodes = torch.tensor(batch.decode_slots, dtype=torch.int64)
        prompt_ids = [token_id for prefill in batch.prefills for token_id in prefill.token_ids]
        token_ids = torch.cat([self._last_sampled[decodes], torch.tensor(prompt_ids, dtype=torch.int64)])
        slots, positions, rows = list(batch.decode_slots), list(batch.decode_positions), list(range(len(decodes)))
        for prefill in batch.prefills:
            slots += [prefill.slot] * len(prefill.token_ids)
            positions += range(prefill.start, prefill.start + len(prefill.token_ids))
            if prefill.sample:
                rows.append(len(slots) - 1)
        at = torch.tensor(positions, dtype=torch.int32)
        self._program.forward(token_ids.int(), at, torch.tensor(slots, dtype=torch.int32), self._page_table)
        row_index = torch.tensor(rows, dtype=torch.int64)
        return Launched(batch, row_index, at[row_index].long() + 1)

    def launch_tail(self, launched: Launched) -> None:
        """LM head and sampling on the R rows that end a prompt or decode."""
        sampled_slots = torch.tensor(launched.batch.sampled_slots, dtype=torch.int64)
        if not len(sampled_slots):
            launched.token_ids, launched.logprobs = sampled_slots, {}
            return
        logits = self._program.head(launched.rows)
        launched.token_ids, launched.logprobs = self._sampler.sample(logits, sampled_slots, launched.positions)
        self._last_sampled[sampled_slots] = launched.token_ids

    def collect(self, launched: Launched) -> Sampled:
        """Wait for a step's samples and bring them to the host."""
        assert launched.token_ids is not None, "collect comes after launch_tail"
        assert launched.logprobs is not None
        return Sampled(launched.batch.step, launched.token_ids.tolist(), launched.logprobs)
