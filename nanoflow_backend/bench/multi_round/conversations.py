"""Conversations are drawn with the moments of public chats; each round's prompt is all that was said before, and more.

The texts are others' and not part of this project; their moments are published:

* tokens of a user's turn and of an answer: the NanoFlow paper (OSDI'25), Table 4, as in bench/workload.py;
* rounds: 2.0 on average in LMSYS-Chat-1M (Zheng et al., ICLR'24); 5.56 in ShareGPT as Pensieve counts it (Yu et al.,
  EuroSys'25), of whose conversations CachedAttention (Gao et al., ATC'24) finds 73 % to have more than one. Both are
  drawn from a geometric distribution: after each round a user goes on with the same probability;
* a user's time between an answer and the next turn: exponential with a mean of 60 s, as Pensieve has it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, NamedTuple

from nanoflow_backend.bench.workload import DATASETS, Dataset, log_moments
from nanoflow_backend.config.error import ConfigError

MEAN_ROUNDS = {"lmsys-like": 2.0, "sharegpt-like": 5.56}
THINK_S = 60.0


class Round(NamedTuple):
    """One turn of a user and its answer."""

    input_tokens: int  # that the user adds; the prompt has all earlier rounds before them
    output_tokens: int
    think_s: float  # from the answer before to this turn; 0 in the first round


@dataclass(frozen=True)
class Conversations:
    """Rounds of each conversation, in the order in which they begin. `facts` say in a result how they were made."""

    name: str
    rounds: tuple[tuple[Round, ...], ...]
    facts: dict[str, Any]

    @property
    def num_rounds(self) -> int:
        return sum(len(rounds) for rounds in self.rounds)

    @property
    def mean_context_tokens(self) -> float:
        """Of prompt and answer at the end of a round, over all rounds: what one conversation holds of a KV cache."""
        total = 0
        for rounds in self.rounds:
            context = 0
            for turn in rounds:
                context += turn.input_tokens + turn.output_tokens
                total += context
        return total / self.num_rounds


def draw_conversations(
    dataset: Dataset, count: int, max_model_tokens: int, *, think_s: float = THINK_S, scale: float = 1.0, seed: int = 0
) -> Conversations:
    """Draw `count` conversations.

    One that would get longer than `max_model_tokens` ends before that; a first round that is too long by itself loses
    tokens of its prompt until a token of the answer fits, and then of the answer.

    Args:
        think_s: the mean of the users' times; 0: they answer at once.
        scale: of all lengths, for models that are smaller than life.

    Raises:
        ConfigError: an option out of range, by its name.
    """
    for option, value, least in (("--conversations", count, 1), ("--think-s", think_s, 0), ("--scale", scale, 1e-3)):
        if not value >= least:
            raise ConfigError(f"{option}: expected {least:g} or more, got {value:g}")
    draw = random.Random(f"conversations {seed}")
    lengths = [log_moments(scale * mean, scale * deviation) for mean, deviation in DATASETS[dataset]]
    goes_on = 1 - 1 / MEAN_ROUNDS[dataset]
    conversations, cut = [], 0
    for _ in range(count):
        rounds: list[Round] = []
        left, more = max_model_tokens, True
        while more:
            input_tokens, output_tokens = (max(1, round(draw.lognormvariate(*moments))) for moments in lengths)
            think = draw.expovariate(1 / think_s) if think_s and rounds else 0.0
            more = draw.random() < goes_on
            if input_tokens + output_tokens > left:
                cut += 1
                if rounds:
                    break
                input_tokens = min(input_tokens, left - 1)
                output_tokens = min(output_tokens, left - input_tokens)
            rounds.append(Round(input_tokens, output_tokens, think))
            left -= input_tokens + output_tokens
            more = more and left >= 2
        conversations.append(tuple(rounds))
    (input_mean, input_std), (output_mean, output_std) = DATASETS[dataset]
    facts = {
        "conversations_drawn": f"log-normal turns of {input_mean} ± {input_std} tokens and answers of {output_mean} ± "
        f"{output_std}, geometric rounds of mean {MEAN_ROUNDS[dataset]}, exponential times of mean {think_s:g} s",
        "scale": scale,
        "seed": seed,
        "max_model_tokens": max_model_tokens,
        "conversations_cut": cut,
    }
    return Conversations(dataset, tuple(conversations), facts)
