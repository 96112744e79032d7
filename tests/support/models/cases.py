"""Tiny checkpoints with requests, and the logits that transformers gives for every token of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from nanoflow_kernels import reference
from support.comparison import assert_close
from support.models.batches import Chunk, Requests, decode_kv_tokens, forward

from benchmarks.models import checkpoints
from nanoflow_backend.config.precision import FLOAT32
from nanoflow_backend.graph.model import Model
from nanoflow_backend.models import weights
from nanoflow_backend.models.hugging_face import read_model_config
from nanoflow_backend.models.model import build
from nanoflow_backend.runtime.binding import Binding
from nanoflow_backend.runtime.collectives.one_rank import OneRank
from nanoflow_backend.runtime.cpu import CpuProgram
from nanoflow_backend.schedule.plan import Schedule

TOKENS = 16
# Three requests: prompts in chunks that nano-batch boundaries cut, decodes beside them, a batch of one token.
BATCHES: list[list[Chunk]] = [
    [(0, 0, 7), (1, 0, 9)],
    [(0, 7, 8), (1, 9, 10), (2, 0, 13)],
    [(1, 10, 11)],
    [(0, 8, 9), (1, 11, 12), (2, 13, 19)],
]
LENGTHS = [9, 12, 19]


class Case:
    """A checkpoint of transformers, its weights as ours, requests, and transformers' logits for every token."""

    def __init__(self, folder: Path, architecture: str, lengths: list[int], **fields: Any) -> None:
        reference_model = checkpoints.make(architecture, **fields)
        checkpoints.save(reference_model, folder)
        self.folder = folder
        self.config = read_model_config(folder)
        self.model: Model = build(self.config)
        self.weights = weights.load(folder, self.config, self.model)
        self.requests = Requests(self.config, lengths)
        with torch.no_grad():
            self.logits = [
                reference_model(ids[None], attention_mask=torch.ones(1, len(ids))).logits[0]
                for ids in self.requests.ids
            ]

    def program(self, *schedules: Schedule, **options: Any) -> CpuProgram:
        """`options` are those of its Binding, and `checked`."""
        options = {"max_tokens": schedules[-1].tokens, "precision": FLOAT32} | options
        checked, kernels = options.pop("checked", True), options.pop("kernels", reference)
        pages = self.requests.empty_pages()
        binding = Binding(self.model, schedules, self.weights, pages, OneRank(), kernels, **options)
        return CpuProgram(binding, checked=checked)

    def check(
        self,
        program: CpuProgram,
        order: Callable[[], Sequence[int]] | None = None,
        batches: Sequence[list[Chunk]] = BATCHES,
    ) -> None:
        """Run the batches one after the other and compare the logits of all their rows."""
        for batch in batches:
            forward(program, self.requests.inputs(batch), decode_kv_tokens(batch), order=order() if order else None)
            expected = self.requests.rows(self.logits, batch)
            assert_close(f"logits of {batch}", program.head(torch.arange(len(expected))), expected)
