"""The sampler: slots, their requests' parameters, and the rows that ask for log-probabilities."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from nanoflow_kernels import reference_sampling
from torch import Tensor

from nanoflow_backend.request.sampling_params import SamplingParams
from nanoflow_backend.sampling.sampler import Sampler, warm_up
from nanoflow_backend.scheduler.batch import Admission

VOCABULARY, EOS, STOP = 40, 7, 8


def sampler(*params: SamplingParams, prompt_tokens: int = 10) -> Sampler:
    """One whose slot i holds a request with params[i]. Its logits are padded with columns that must not be drawn."""
    made = Sampler(len(params), VOCABULARY, (EOS,))
    made.admit([Admission(slot, prompt_tokens, p) for slot, p in enumerate(params)])
    return made


def peaked(*best: int) -> Tensor:
    """Logits [1, 48] whose order is `best`; the 8 columns of padding are larger than all."""
    logits = torch.zeros(1, VOCABULARY + 8)
    for height, token in enumerate(reversed(best), start=1):
        logits[0, token] = 5.0 * height
    logits[0, VOCABULARY:] = 1000
    return logits


def drawn(made: Sampler, logits: Tensor, position: int, slot: int = 0) -> int:
    return int(made.sample(logits, [slot], [position])[0])


@pytest.mark.parametrize("temperature", [0.0, 0.01])
@pytest.mark.parametrize("ignore_eos", [False, True])
def test_min_tokens_holds_back_eos_and_stop_ids(temperature: float, ignore_eos: bool) -> None:
    params = SamplingParams(
        temperature=temperature, min_tokens=3, stop_token_ids=(STOP, 10**6), ignore_eos=ignore_eos, seed=1
    )
    made, logits = sampler(params), peaked(EOS, STOP, 20)
    before = logits.clone()
    # The prompt's last token, at position 9, gives output 0: the fourth output is the first that may stop.
    assert [drawn(made, logits, 9 + output) for output in range(5)] == [20, 20, 20, EOS, EOS]
    assert torch.equal(logits, before), "the logits belong to the program"


def test_a_slot_forgets_the_request_before() -> None:
    made = sampler(SamplingParams(temperature=1, top_k=1, min_tokens=9, stop_token_ids=(STOP,), logprobs=2, seed=3))
    made.admit([Admission(0, 10, SamplingParams(temperature=0))])
    ids, found = made.sample(peaked(STOP, 20), [0], [9])
    assert ids.tolist() == [STOP]
    assert found.by_slot() == {}
    assert made.sample(torch.zeros(0, VOCABULARY), [], [])[0].tolist() == []


def test_a_request_is_reproducible_in_any_slot_and_batch() -> None:
    params = [SamplingParams(temperature=t, top_p=0.9, seed=11 + t) for t in (0, 1, 2)]
    logits = torch.randn(3, VOCABULARY, generator=torch.Generator().manual_seed(0))
    together = sampler(*params).sample(logits, [0, 1, 2], [9, 30, 12])[0].tolist()
    backwards = sampler(*params[::-1]).sample(logits.flip(0), [0, 1, 2], [12, 30, 9])[0].tolist()
    assert backwards == together[::-1]
    assert [
        drawn(sampler(p), logits[i : i + 1], at) for i, (p, at) in enumerate(zip(params, (9, 30, 12), strict=True))
    ] == together


def test_logprobs_come_to_the_rows_that_asked_and_before_masks() -> None:
    params = [
        SamplingParams(temperature=0),
        SamplingParams(temperature=0, logprobs=0),
        SamplingParams(temperature=0, logprobs=2, min_tokens=1),
    ]
    ids, found = sampler(*params).sample(peaked(EOS, 20, 30).repeat(3, 1), [0, 1, 2], [9, 9, 9])
    by_slot = found.by_slot()
    assert ids.tolist() == [EOS, EOS, 20]
    assert by_slot.keys() == {1, 2}
    assert (by_slot[1].token_ids, by_slot[1].sampled_rank) == ([EOS], 1)
    assert (by_slot[2].token_ids, by_slot[2].sampled_rank) == ([20, EOS, 20], 2)
    mass = math.exp(15) + math.exp(10) + math.exp(5) + VOCABULARY - 3
    assert by_slot[2].logprobs == pytest.approx([h - math.log(mass) for h in (10, 15, 10)], abs=1e-5)


@pytest.mark.parametrize("rows", [1, 3])
def test_warm_up_runs_every_kernel_and_changes_no_logits(rows: int) -> None:
    called = set()

    def noted(name: str) -> Any:
        def kernel(*args: Any) -> Any:
            called.add(name)
            return getattr(reference_sampling, name)(*args)

        return kernel

    names = ("greedy", "sample", "mask", "penalise", "logprobs")
    logits = torch.randn(rows, VOCABULARY + 8, generator=torch.Generator().manual_seed(0))
    before = logits.clone()
    warm_up(logits, VOCABULARY, SimpleNamespace(**{name: noted(name) for name in names}))  # type: ignore[arg-type]
    assert called == set(names)
    assert torch.equal(logits, before)
