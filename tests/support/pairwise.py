"""Rows of a test that meet every pair of choices, far fewer than the full product."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations, product
from random import Random
from typing import Any


def pairwise_rows(factors: Mapping[str, Sequence[Any]], seed: int = 0, candidates: int = 50) -> list[dict[str, Any]]:
    """Greedy: each row starts from a pair that is still open, and is the best of some random ones."""
    random = Random(seed)
    names = list(factors)
    open_pairs = {((a, x), (b, y)) for a, b in combinations(names, 2) for x, y in product(factors[a], factors[b])}
    rows: list[dict[str, Any]] = []
    while open_pairs:
        fixed = dict(min(open_pairs, key=repr))
        tried = [{name: fixed.get(name, random.choice(factors[name])) for name in names} for _ in range(candidates)]
        rows.append(max(tried, key=lambda row: len(open_pairs & pairs(row))))
        open_pairs -= pairs(rows[-1])
    return rows


def pairs(row: Mapping[str, Any]) -> set[tuple[tuple[str, Any], tuple[str, Any]]]:
    return set(combinations(row.items(), 2))
