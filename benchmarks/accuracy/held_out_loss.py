"""What a precision costs in accuracy: the loss of the demo model on text that it was not trained on.

The text is every 50th document of CPython's own documentation, as demo/train.py has it, in rows of 256 tokens.
"""

from __future__ import annotations

import math
from pathlib import Path
from statistics import fmean, stdev
from typing import Annotated

import tokenizers
import typer
from rich.progress import track

from demo.corpus import TEXT_SHA256, documents, text_sha256
from demo.train import END, FOLDER, seen_and_held_out
from nanoflow_backend.bench import result
from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.engine import LLM, SamplingParams

ROW_TOKENS = 256
PRECISIONS: dict[str, dict[str, str]] = {
    "weights of 16 bits": {},
    "weights in FP8": {"quantization": "fp8"},
    "weights and KV cache in FP8": {"quantization": "fp8", "kv_cache_dtype": "fp8_e4m3"},
}


def main(
    output: Annotated[Path | None, typer.Option(help="The JSON result.")] = None,
    rows: Annotated[int | None, typer.Option(help="So many rows of text, instead of all.")] = None,
) -> None:
    """The demo model's loss on held-out text, nats a token, in each precision."""
    texts = documents()
    if (found := text_sha256(texts)) != TEXT_SHA256:
        raise ConfigError(f"the text of this Python is another one than the model's: {found}, expected {TEXT_SHA256}")
    tokenizer = tokenizers.Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    ids = [token for document in seen_and_held_out(texts)[1] for token in tokenizer.encode(document.text + END).ids]
    cut = [ids[start : start + ROW_TOKENS] for start in range(0, len(ids) - ROW_TOKENS + 1, ROW_TOKENS)][:rows]
    losses: dict[str, list[float]] = {}
    for name, settings in PRECISIONS.items():
        llm = LLM.from_pretrained(FOLDER, **settings)
        losses[name] = [row_loss(llm, row) for row in track(cut, name)]
        llm.close()
    before = next(iter(losses.values()))
    measured = {
        name: {
            "nats_per_token": round(fmean(each), 5),
            "more_than_16_bits": round(fmean(each) - fmean(before), 5),
            "standard_error_of_that": round(stdev(map(float.__sub__, each, before)) / math.sqrt(len(each)), 5),
        }
        for name, each in losses.items()
    }
    for name, figures in measured.items():
        print(f"{name}: {figures['nats_per_token']:.4f} nats a token ({figures['more_than_16_bits']:+.4f})")
    if output:
        about = {"model": "tiny-llama", "dtype": "float32", "rows": len(before), "row_tokens": ROW_TOKENS}
        result.write({**about, "precisions": measured}, output)


def row_loss(llm: LLM, row: list[int]) -> float:
    """The mean of -log p over all tokens of a row but the first, nats."""
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, ignore_eos=True)
    (completion,) = llm.generate([row], params)
    assert completion.prompt_logprobs is not None
    return -fmean(scores.logprobs[0] for scores in completion.prompt_logprobs)
