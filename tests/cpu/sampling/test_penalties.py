"""Penalties and biases: against transformers, and step by step against float64 arithmetic on a request's own tokens."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
import torch
from nanoflow_kernels.reference_sampling import IN_PROMPT, penalise
from transformers import RepetitionPenaltyLogitsProcessor

from nanoflow_backend.request.sampling_params import SamplingParams
from nanoflow_backend.sampling.sampler import Sampler
from nanoflow_backend.scheduler.batch import Admission

VOCABULARY = 31
ONE = torch.ones(1)
NONE = torch.zeros(1)


@pytest.mark.parametrize("repetition", [0.5, 1.0, 1.3, 7.0])
def test_repetition_is_that_of_transformers(repetition: float) -> None:
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(1, VOCABULARY, generator=random) * 4
    tokens = torch.randint(VOCABULARY, (1, 12), generator=random)
    seen = torch.zeros(1, VOCABULARY, dtype=torch.int32)
    seen[0, tokens[0, :5]] = IN_PROMPT
    for token in tokens[0, 5:]:
        seen[0, token] += 1
    expected = RepetitionPenaltyLogitsProcessor(repetition)(tokens, logits.clone())
    row = torch.zeros(1, dtype=torch.int64)
    penalise(logits, row, seen, row, repetition * ONE, NONE, NONE)
    torch.testing.assert_close(logits, expected)


def expected_token(logits: np.ndarray, prompt: list[int], output: list[int], params: SamplingParams) -> int:
    """The most likely token by the definitions, a token at a time."""
    scores = logits.astype(np.float64)
    for token in range(VOCABULARY):
        scores[token] += params.logit_bias.get(token, 0.0)
        if token in prompt or token in output:
            scores[token] *= params.repetition_penalty if scores[token] < 0 else 1 / params.repetition_penalty
        if token in output:
            scores[token] -= params.frequency_penalty * output.count(token) + params.presence_penalty
    return int(scores.argmax())


def some_params(random: Random) -> SamplingParams:
    return SamplingParams(
        temperature=0.0,
        repetition_penalty=random.choice([1.0, 1.0, 1.4, 0.8]),
        presence_penalty=random.choice([0.0, 0.0, 1.5, -1.0]),
        frequency_penalty=random.choice([0.0, 0.0, 0.75, -0.5]),
        logit_bias=random.choice([{}, {}, {3: 4.0, 7: -100.0}, {30: 100.0}]),
    )


@pytest.mark.parametrize("seed", range(6))
def test_every_step_counts_what_the_steps_before_have_drawn(seed: int) -> None:
    """Requests come, go, are preempted and come back in other slots; rows are in any order; some have no penalty."""
    random, slots = Random(seed), 24
    generator = torch.Generator().manual_seed(seed)
    sampler = Sampler(slots, VOCABULARY)
    running: dict[int, tuple[list[int], list[int], SamplingParams]] = {}
    preempted: list[tuple[list[int], list[int], SamplingParams]] = []
    changed = 0
    for _ in range(60):
        for slot in random.sample(sorted(running), k=min(2, len(running))):
            request = running.pop(slot)
            preempted += [request] if random.random() < 0.6 else []
        for slot in random.sample(sorted(set(range(slots)) - running.keys()), k=random.randint(0, 4)):
            if slot in running or len(running) == 20:
                continue
            fresh = ([random.randrange(VOCABULARY) for _ in range(random.randint(1, 9))], [], some_params(random))
            prompt, output, params = preempted.pop() if preempted else fresh
            known = [*prompt, *output] if params.reads_tokens else []
            sampler.admit([Admission(slot, len(prompt), params, known)])
            running[slot] = prompt, output, params
        batch = random.sample(sorted(running), k=random.randint(0, len(running)))
        logits = torch.randn(len(batch), VOCABULARY + 3, generator=generator) * 3
        kept = logits.clone()
        positions = [len(running[slot][0]) + len(running[slot][1]) - 1 for slot in batch]
        drawn = sampler.sample(logits, batch, positions).token_ids.tolist()
        assert torch.equal(logits, kept), "the logits belong to the program"
        for slot, row, token in zip(batch, logits[:, :VOCABULARY].numpy(), drawn, strict=True):
            prompt, output, params = running[slot]
            assert token == expected_token(row, prompt, output, params)
            changed += token != int(row.argmax())
            output.append(token)
    assert changed > 20, "the penalties hardly matter: this proves little"


def test_the_table_grows_with_the_requests_that_are_penalised() -> None:
    sampler = Sampler(40, VOCABULARY)
    admissions = [
        Admission(slot, 2, SamplingParams(temperature=0.0, presence_penalty=2.0 * (slot % 2)), [1, 2])
        for slot in range(40)
    ]
    logits = torch.zeros(40, VOCABULARY)
    logits[:, 5], logits[:, 6] = 2.0, 1.0
    for _ in range(2):  # the second time the slots are taken over, and nothing more is needed
        sampler.admit(admissions)
        draws = [sampler.sample(logits, range(40), [position] * 40).token_ids.tolist() for position in (1, 2, 3)]
        assert [draw[1] for draw in draws] == [5, 6, 0]
        assert [draw[0] for draw in draws] == [5, 5, 5]
        assert all(len(set(draw[1::2])) == 1 for draw in draws)
        assert len(sampler._penalties._seen) == 32


def test_who_asks_for_nothing_costs_nothing() -> None:
    sampler = Sampler(4, VOCABULARY)
    sampler.admit([Admission(slot, 2, SamplingParams(temperature=0.0)) for slot in range(4)])
    sampler.sample(torch.zeros(4, VOCABULARY), range(4), [1] * 4)
    assert len(sampler._penalties._seen) == 0
