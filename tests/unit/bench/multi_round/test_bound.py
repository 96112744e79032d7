"""The bound of conversations, against counting token by token."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from nanoflow_backend.bench.multi_round.bound import Bound, StepCost
from nanoflow_backend.bench.multi_round.conversations import Conversations, draw_conversations
from nanoflow_backend.config.error import ConfigError


class Lengths(NamedTuple):
    prompt_tokens: int
    new_tokens: int
    output_tokens: int


def lengths(drawn: Conversations) -> list[Lengths]:
    found = []
    for rounds in drawn.rounds:
        for number, turn in enumerate(rounds):
            before = sum(earlier.input_tokens + earlier.output_tokens for earlier in rounds[:number])
            found.append(Lengths(before + turn.input_tokens, turn.input_tokens, turn.output_tokens))
    return found


COST = StepCost(least_s=0.0, token_s=1e-3, kv_token_s=1e-6)


def test_tokens_are_those_of_a_walk_through_every_round() -> None:
    drawn = draw_conversations("lmsys-like", 40, 600, seed=3)
    prompts = new = outputs = read = 0
    for rounds in drawn.rounds:
        said: list[str] = []
        for turn in rounds:
            known = len(said)
            said += ["user"] * turn.input_tokens
            prompts += len(said)
            new += len(said) - known
            for answered in range(turn.output_tokens):
                said.append("answer")
                read += len(said) - 1 if answered else 0  # a decode reads the token before it, too
                outputs += 1
    bound = Bound.of(lengths(drawn), COST, kv_cache_tokens=10**6)
    assert (bound.rounds, bound.prompt_tokens, bound.new_prompt_tokens) == (drawn.num_rounds, prompts, new)
    assert (bound.output_tokens, bound.decode_kv_tokens) == (outputs, read)
    decodes = outputs - drawn.num_rounds
    assert bound.rounds_per_s == pytest.approx(drawn.num_rounds / (1e-3 * (new + decodes) + 1e-6 * read))
    assert bound.recomputing_rounds_per_s == pytest.approx(
        drawn.num_rounds / (1e-3 * (prompts + decodes) + 1e-6 * read)
    )
    assert bound.speedup == pytest.approx(bound.rounds_per_s / bound.recomputing_rounds_per_s)
    facts = bound.facts()
    assert facts["saved_prompt_tokens"] == prompts - new
    assert facts["fewer_prompt_tokens"] == pytest.approx(prompts / new, abs=1e-3)


def test_a_small_cache_takes_more_steps_than_the_tokens_fill() -> None:
    drawn = draw_conversations("lmsys-like", 40, 600, seed=3)
    cost = StepCost(least_s=1.0, token_s=1e-9, kv_token_s=0.0)
    bound = Bound.of(lengths(drawn), cost, kv_cache_tokens=1000)
    assert bound.rounds_per_s == pytest.approx(drawn.num_rounds / (bound.decode_kv_tokens / 1000))
    assert bound.speedup == 1.0


def test_a_step_costs_the_weights_or_its_tokens_and_the_cache_that_it_reads() -> None:
    cost = StepCost(least_s=2.0, token_s=0.5, kv_token_s=0.01)
    assert [cost.of(tokens, 100) for tokens in (1, 4, 6)] == [3.0, 3.0, 4.0]


def test_the_cost_of_a_step_is_read_in_its_units() -> None:
    cost = StepCost.parse("5.6,22.3,33.4")
    assert [cost.least_s, cost.token_s, cost.kv_token_s] == pytest.approx([5.6e-3, 22.3e-6, 33.4e-9])
    for text in ("5.6,22.3", "5.6,22.3,x", "5.6,0,33.4", "nan,1,1"):
        with pytest.raises(ConfigError, match=f"--step-cost: expected three numbers above 0 .* got {text}"):
            StepCost.parse(text)
