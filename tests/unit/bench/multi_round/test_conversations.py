"""Conversations have the moments that are promised, and fit the model."""

from __future__ import annotations

from statistics import fmean, pstdev

import pytest

from nanoflow_backend.bench.multi_round.conversations import MEAN_ROUNDS, Conversations, Round, draw_conversations
from nanoflow_backend.bench.workload import DATASETS
from nanoflow_backend.config.error import ConfigError

ENDLESS = 10**9  # tokens of a model that cuts nothing


@pytest.mark.parametrize("dataset", DATASETS)
def test_moments_are_those_of_the_dataset(dataset: str) -> None:
    drawn = draw_conversations(dataset, 8000, ENDLESS, think_s=30)
    turns = [turn for rounds in drawn.rounds for turn in rounds]
    (input_mean, input_std), (output_mean, output_std) = DATASETS[dataset]
    assert fmean(len(rounds) for rounds in drawn.rounds) == pytest.approx(MEAN_ROUNDS[dataset], rel=0.03)
    assert fmean(turn.input_tokens for turn in turns) == pytest.approx(input_mean, rel=0.03)
    assert fmean(turn.output_tokens for turn in turns) == pytest.approx(output_mean, rel=0.03)
    assert pstdev(turn.input_tokens for turn in turns) == pytest.approx(input_std, rel=0.2)
    assert pstdev(turn.output_tokens for turn in turns) == pytest.approx(output_std, rel=0.1)
    assert fmean(turn.think_s for rounds in drawn.rounds for turn in rounds[1:]) == pytest.approx(30, rel=0.05)
    assert {rounds[0].think_s for rounds in drawn.rounds} == {0.0}
    assert min(turn.input_tokens for turn in turns) >= 1
    assert drawn.facts["conversations_cut"] == 0


def test_the_same_seed_draws_the_same_and_no_thinking_changes_no_length() -> None:
    drawn = draw_conversations("lmsys-like", 50, 4096)
    assert draw_conversations("lmsys-like", 50, 4096) == drawn
    assert draw_conversations("lmsys-like", 50, 4096, seed=1).rounds != drawn.rounds
    hasty = draw_conversations("lmsys-like", 50, 4096, think_s=0)
    assert all(turn.think_s == 0 for rounds in hasty.rounds for turn in rounds)


@pytest.mark.parametrize("most", [2, 3, 40, 512, 4096])
def test_no_conversation_is_longer_than_the_model_takes(most: int) -> None:
    drawn = draw_conversations("sharegpt-like", 300, most)
    lengths = [sum(turn.input_tokens + turn.output_tokens for turn in rounds) for rounds in drawn.rounds]
    assert max(lengths) <= most
    assert all(turn.input_tokens >= 1 and turn.output_tokens >= 1 for rounds in drawn.rounds for turn in rounds)
    assert all(drawn.rounds)
    assert drawn.facts["conversations_cut"] > 10


def test_a_scale_shortens_all_lengths() -> None:
    drawn = draw_conversations("lmsys-like", 5000, ENDLESS, scale=0.5)
    turns = [turn for rounds in drawn.rounds for turn in rounds]
    assert fmean(turn.output_tokens for turn in turns) == pytest.approx(111, rel=0.04)


def test_the_mean_context_is_of_all_rounds() -> None:
    two = (Round(10, 5, 0.0), Round(3, 2, 1.0))
    assert Conversations("x", (two, (Round(1, 1, 0.0),)), {}).mean_context_tokens == (15 + 20 + 2) / 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, "--conversations: expected 1 or more, got 0"),
        ({"think_s": -1.0}, "--think-s: expected 0 or more, got -1"),
        ({"scale": float("nan")}, "--scale: expected 0.001 or more, got nan"),
    ],
)
def test_options_out_of_range_are_named(options: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        draw_conversations(**{"dataset": "lmsys-like", "count": 1, "max_model_tokens": 100} | options)
