"""What our benchmark calls of vLLM, with a model of three parameters and a generation that computes nothing."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch


@dataclass
class SamplingParams:
    temperature: float
    max_tokens: int
    ignore_eos: bool
    detokenize: bool


class LLM:
    def __init__(self, model: str, skip_tokenizer_init: bool, **settings: Any) -> None:
        assert os.environ["NCCL_NVLS_ENABLE"] == "0"
        assert settings["load_format"] == "dummy"
        self.model = made(settings["quantization"])

    def apply_model(self, function: Callable[[Any], Any]) -> list[Any]:
        return [function(self.model)]

    def generate(
        self, prompts: Sequence[dict[str, list[int]]], params: Sequence[SamplingParams], use_tqdm: bool
    ) -> list[Any]:
        time.sleep(0.01)
        assert len({tuple(prompt["prompt_token_ids"]) for prompt in prompts}) == len(prompts)
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=[0] * each.max_tokens)]) for each in params]


def made(quantization: str | None) -> torch.nn.Module:
    """A norm and a matrix; in FP8 that is a transposed view, with a scale, as vLLM leaves it."""
    model = torch.nn.Module()
    model.input_layernorm = torch.nn.Parameter(torch.zeros(64))
    if quantization is None:
        model.weight = torch.nn.Parameter(torch.zeros(300, 200, dtype=torch.bfloat16))
    else:
        assert quantization == "fp8"
        quantised = torch.zeros(300, 200).to(torch.float8_e4m3fn).t()
        model.weight = torch.nn.Parameter(quantised, requires_grad=False)
        model.weight_scale = torch.nn.Parameter(torch.tensor(1.0))
    return model
