"""Write the inputs of the load tests, with prompts of exact lengths by the model's own tokenizer.

    python perf_analyzer_configs/make_inputs.py --model /models/Llama-3.1-8B-Instruct --output inputs

For each workload of workloads.json: NAME.json, the input data of perf_analyzer, and NAME.jsonl, the same prompts for
aiperf. A prompt is random words, each one token long; its length counts the BOS token that the server adds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nanoflow_backend.text.tokenizer import Tokenizer

WORKLOADS = Path(__file__).with_name("workloads.json")
ENOUGH_WORDS = 2000  # to draw from; a vocabulary has tens of thousands
ATTEMPTS = 50


class Prompts:
    """Texts of exact lengths. Raises ValueError for a tokenizer that has too few words of one token."""

    def __init__(self, tokenizer: Tokenizer, seed: int) -> None:
        self._tokenizer = tokenizer
        self._random = random.Random(seed)
        self._words = list(itertools.islice(self._single_token_words(), ENOUGH_WORDS))
        if len(self._words) < 100:
            raise ValueError(f"expected 100 words or more that are one token, got {len(self._words)}")

    def draw(self, tokens: int, prefix: str = "") -> str:
        """A text that encodes to `tokens` ids, and begins with `prefix` (text and ids)."""
        prefix_ids = self._tokenizer.encode(prefix) if prefix else []
        words = tokens - len(self._tokenizer.encode(prefix))
        for _ in range(ATTEMPTS):
            drawn = self._random.choices(self._words, k=max(0, words))
            text = " ".join([prefix, *drawn] if prefix else drawn)
            ids = self._tokenizer.encode(text)
            if len(ids) == tokens and ids[: len(prefix_ids)] == prefix_ids:
                return text
            words += tokens - len(ids)  # some tokenizers make another token of the first word, or where two meet
        raise ValueError(f"found no prompt of {tokens} tokens, of which {len(prefix_ids)} a prefix")

    def _single_token_words(self) -> Iterator[str]:
        ids = list(range(self._tokenizer.vocab_size))
        self._random.shuffle(ids)
        alone = len(self._tokenizer.encode("a"))
        for token_id in ids:
            word = self._tokenizer.token_text(token_id).strip(" ▁")
            if word.isascii() and word.isalpha() and len(self._tokenizer.encode(f"a {word}")) == alone + 1:
                yield word


def requests(workloads: dict[str, Any], name: str, prompts: Prompts, rng: random.Random, scale: float) -> Iterator[Any]:
    """(prompt, output tokens) of each request of a workload."""
    workload = workloads[name]
    if "mix" in workload:
        kinds = rng.choices(list(workload["mix"]), list(workload["mix"].values()), k=workload["prompts"])
        for kind in kinds:
            yield next(requests({kind: workloads[kind]}, kind, prompts, rng, scale))
        return
    input_tokens, output_tokens = (max(1, round(workload[f"{side}_tokens"] * scale)) for side in ("input", "output"))
    prefixes = [prompts.draw(round(workload["prefix_tokens"] * scale)) for _ in range(workload.get("prefixes", 0))]
    for _ in range(workload["prompts"]):
        yield prompts.draw(input_tokens, rng.choice(prefixes) if prefixes else ""), output_tokens


def perf_analyzer_entry(prompt: str, output_tokens: int) -> dict[str, list[Any]]:
    sampling = {"max_tokens": output_tokens, "min_tokens": output_tokens, "ignore_eos": True, "temperature": 0}
    return {
        "text_input": [prompt],
        "stream": [True],
        "sampling_parameters": [json.dumps(sampling)],
        "return_num_input_tokens": [True],
        "return_num_output_tokens": [True],
    }


def main() -> None:
    workloads = json.loads(WORKLOADS.read_text())
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, required=True, help="folder with the model's tokenizer.json")
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")
    parser.add_argument("--scale", type=float, default=1, help="factor on all lengths, which are for a 2k context")
    parser.add_argument("--prompts", type=int, help="how many in each file, instead of what workloads.json says")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    prompts, rng = Prompts(Tokenizer.from_pretrained(options.model), options.seed), random.Random(options.seed)
    if options.prompts:
        workloads = {name: {**workload, "prompts": options.prompts} for name, workload in workloads.items()}
    for name in workloads:
        drawn = list(requests(workloads, name, prompts, rng, options.scale))
        data = {"data": [perf_analyzer_entry(*request) for request in drawn]}
        (options.output / f"{name}.json").write_text(json.dumps(data, indent=1))
        lines = [json.dumps({"text": prompt, "output_length": tokens}) + "\n" for prompt, tokens in drawn]
        (options.output / f"{name}.jsonl").write_text("".join(lines))
        print(f"{options.output / name}: {len(drawn)} prompts")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"make_inputs.py: {error}")
