"""Collectives: one rank, and ranks of one process, against numpy; those over gloo are in test_gloo."""

from __future__ import annotations

import pytest
import torch
from support.collectives.checks import TOLERANCE, check_collectives
from support.collectives.in_process import run_ranks

from nanoflow_backend.runtime.collectives.one_rank import OneRank
from nanoflow_backend.runtime.collectives.protocol import rank_rows

TOKENS = (0, 1, 3, 7)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("num_sms", [None, 3])
def test_one_rank_copies_and_norms_all_rows(dtype: torch.dtype, num_sms: int | None) -> None:
    for tokens in TOKENS:
        check_collectives(OneRank(), tokens, dtype, num_sms)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_the_fused_form_is_composed_for_any_implementation(ranks: int) -> None:
    for tokens in TOKENS:
        run_ranks(ranks, lambda one, tokens=tokens: check_collectives(one, tokens, torch.float32, 5))


def test_rows_are_shared_out_once_each_and_in_order() -> None:
    for tokens in range(40):
        for ranks in range(1, 9):
            shares = [rank_rows(tokens, rank, ranks) for rank in range(ranks)]
            assert [row for share in shares for row in share] == list(range(tokens))
            assert max(map(len, shares)) == len(shares[0]) == -(-tokens // ranks)
