"""The reference of sampling: its random stream bit for bit, distributions by chi-square, and rows on their own."""

from __future__ import annotations

import math
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from nanoflow_kernels.reference_sampling import logprobs, philox, sample, uniform
from scipy.stats import chisquare, kstest
from torch import Tensor

# key, counter and output of the Random123 library's known-answer tests (kat_vectors, philox4x32 10)
KNOWN = [
    ((0, 0), (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 2, (0xFFFFFFFF,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0xA4093822, 0x299F31D0),
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
# the kernel language's rand(seed, offset) (3.6, interpreted), of 64-bit seeds and offsets
RAND = [
    (0, 0, 0.7980929017066956),
    (1, 1, 0.6560034155845642),
    (9223372036854775807, 2147483647, 0.2675665020942688),
    (12345678901234567, 4294967296, 0.9831114411354065),
    (7106521602475165645, 7, 0.9668336510658264),
    (746805015404516437, 2027837527, 0.040205515921115875),
    (8963783824838420066, 432508404, 0.7914119362831116),
    (6604845167042249220, 1519522183, 0.765449583530426),
    (4029557120079369747, 1864753826, 0.474791020154953),
    (2569146471088859254, 1358054485, 0.23156574368476868),
    (2577854692418029171, 878225224, 0.9106699824333191),
    (1749318759610081913, 2048741382, 0.701202929019928),
    (2710959347947821323, 1901353491, 0.08357080817222595),
    (1821862095355237593, 134262792131, 0.5273761749267578),
    (1360307757430227195, 201923771560, 0.2820681035518646),
    (6091063652223914538, 733870765866, 0.8761346936225891),
]


def rows(count: int, **columns: Any) -> tuple[Tensor, ...]:
    """temperature, top_k, top_p, min_p, seed, position of `count` rows."""
    defaults = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 5, "position": range(count)}
    dtypes = {"temperature": torch.float64, "top_p": torch.float64, "min_p": torch.float64}
    return tuple(
        torch.tensor(list(v) if isinstance(v, range | list) else [v] * count, dtype=dtypes.get(name, torch.int64))
        for name, v in (defaults | columns).items()
    )


@pytest.mark.parametrize(("key", "counter", "output"), KNOWN)
def test_philox_known_answers(key: tuple[int, ...], counter: tuple[int, ...], output: tuple[int, ...]) -> None:
    words = philox(*(torch.tensor([word]) for word in key + counter))
    assert tuple(int(word) for word in words) == output


def test_uniform_is_the_kernel_languages_rand() -> None:
    seed, offset, expected = (torch.tensor(column) for column in zip(*RAND, strict=True))
    assert uniform(seed, offset).tolist() == expected.float().tolist()


def test_uniform_is_uniform_over_positions_and_over_seeds() -> None:
    many = torch.arange(20_000)
    for u in (uniform(torch.full_like(many, 2**62 + 3), many), uniform(many, torch.full_like(many, 17))):
        assert float(u.min()) >= 0
        assert float(u.max()) < 1
        assert kstest(u.double().numpy(), "uniform").pvalue > 0.001


def exact(logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float) -> list[float]:
    """The distribution by the definition, a token at a time."""
    weights = [math.exp(x / temperature) for x in logits]
    weights = [w if w >= min_p * max(weights) else 0.0 for w in weights]
    order = sorted(range(len(logits)), key=lambda i: (-weights[i], i))[: top_k or None]
    mass = sum(weights[i] for i in order)
    kept, total = [], 0.0
    for i in order:
        kept.append(i)
        total += weights[i] / mass
        if top_p < 1 and total >= top_p:
            break
    mass = sum(weights[i] for i in kept)
    return [weights[i] / mass if i in kept else 0.0 for i in range(len(logits))]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [
        (1, 0, 1, 0),
        (0.5, 0, 1, 0),
        (2.5, 0, 1, 0),
        (1, 5, 1, 0),
        (1, 1, 1, 0),
        (1, 0, 0.8, 0),
        (1, 0, 1e-9, 0),
        (0.7, 7, 0.6, 0),
        (1, 99, 0.99, 0),
        (1, 0, 1, 0.1),
        (1.5, 0, 1, 1),
        (2, 5, 1, 0.02),
        (2, 0, 0.9, 0.1),
    ],
)
def test_frequencies_are_the_probabilities(temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    random, draws = Random(1), 20_000
    logits = [random.gauss(0, 1.5) for _ in range(13)]
    expected = np.array(exact(logits, temperature, top_k, top_p, min_p))
    parameters = rows(draws, temperature=float(temperature), top_k=top_k, top_p=float(top_p), min_p=float(min_p))
    ids = sample(torch.tensor(logits).repeat(draws, 1), *parameters)
    counts = np.bincount(ids.numpy(), minlength=13)
    assert not counts[expected == 0].any()
    if (expected > 0).sum() > 1:
        assert chisquare(counts[expected > 0], draws * expected[expected > 0]).pvalue > 0.001


def test_top_p_is_taken_of_what_top_k_leaves() -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()  # top 2 hold 4/7 and 3/7: 0.57 is reached with one token
    drawn = {
        top_k: set(sample(logits.repeat(500, 1), *rows(500, top_k=top_k, top_p=0.57)).tolist()) for top_k in (0, 2)
    }
    assert drawn == {0: {0, 1}, 2: {0}}


def test_equal_logits_are_cut_by_id() -> None:
    assert set(sample(torch.zeros(500, 9), *rows(500, top_k=3)).tolist()) == {0, 1, 2}
    assert sample(torch.tensor([[0.0, 2.0, 2.0]]), *rows(1, temperature=0.0)).tolist() == [1]


def test_banned_tokens_are_never_drawn() -> None:
    logits = torch.zeros(2000, 5)
    logits[:, [0, 4]] = -torch.inf
    for top_p in (1.0, 0.9):
        assert set(sample(logits, *rows(2000, top_p=top_p)).tolist()) == {1, 2, 3}
    logits[:] = -torch.inf
    assert set(sample(logits, *rows(2000)).tolist()) <= set(range(5)), "nothing is possible: still an id of the model"


@pytest.mark.parametrize("temperature", [1e-30, 1e-3, 1e30])
def test_extreme_temperatures_are_numbers_too(temperature: float) -> None:
    ids = sample(torch.tensor([[1e4, -1e4, 0.0]]).repeat(600, 1), *rows(600, temperature=temperature))
    assert set(ids.tolist()) == ({0, 1, 2} if temperature > 1 else {0})


def test_a_row_does_not_depend_on_its_batch() -> None:
    generator, count = torch.Generator().manual_seed(0), 50
    logits = torch.randn(count, 997, generator=generator) * 3
    random = Random(0)
    parameters = rows(
        count,
        temperature=[random.choice([0.0, 0.3, 1.0, 2.0]) for _ in range(count)],
        top_k=[random.choice([0, 1, 7, 50]) for _ in range(count)],
        top_p=[random.choice([1.0, 0.9, 0.2]) for _ in range(count)],
        min_p=[random.choice([0.0, 0.0, 0.1]) for _ in range(count)],
        seed=[random.randrange(2**63) for _ in range(count)],
        position=[random.randrange(100_000) for _ in range(count)],
    )
    together = sample(logits, *parameters).tolist()
    for size in (1, 3, 17):
        for chosen in (torch.randperm(count, generator=generator)[:size] for _ in range(20)):
            assert sample(logits[chosen], *(p[chosen] for p in parameters)).tolist() == [together[i] for i in chosen]


def test_logprobs_are_of_the_token_and_then_the_best() -> None:
    logits = torch.randn(4, 11, generator=torch.Generator().manual_seed(0))
    ids, values, rank = logprobs(logits, torch.tensor([0, 3, 5, int(logits[3].argmax())]), 3)
    for row in range(4):
        total = sum(math.exp(x) for x in logits[row].tolist())
        exact_values = [x - math.log(total) for x in logits[row].tolist()]
        best = sorted(range(11), key=lambda i: -exact_values[i])
        assert ids[row].tolist()[1:] == best[:3]
        assert values[row].tolist() == pytest.approx([exact_values[i] for i in ids[row].tolist()], abs=1e-5)
        assert best[int(rank[row]) - 1] == int(ids[row, 0])
