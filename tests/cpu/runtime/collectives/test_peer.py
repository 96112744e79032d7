"""PeerToPeer: the protocol over our kernels, in their interpreter, by ranks that are processes over shared memory."""

from __future__ import annotations

import warnings
from unittest.mock import Mock

import pytest
import torch
from nanoflow_kernels.collectives.copy_engine import CopyEngine
from nanoflow_kernels.collectives.peers import Peers, virtual_peers
from support.collectives.checks import check_collectives
from support.collectives.peer_ranks import run_peers

from nanoflow_backend.runtime.collectives import peer
from nanoflow_backend.runtime.collectives.peer import PeerToPeer, buffer_bytes

if torch.cuda.is_available():
    pytest.skip("the kernels are compiled here: see tests/gpu", allow_module_level=True)


def check_both_forms(peers: Peers) -> None:
    warnings.simplefilter("ignore", DeprecationWarning)  # the interpreter's own
    for one_shot_bytes in (0, 1024):
        check_collectives(PeerToPeer(peers, one_shot_bytes=one_shot_bytes), 7, torch.float32, 1)


def test_all_calls_of_the_protocol_in_buffers_of_the_size_that_is_asked_for() -> None:
    run_peers(2, check_both_forms, buffer_bytes(2, 7, 16, 4, one_shot_bytes=1024))


def test_an_all_reduce_is_one_shot_up_to_so_many_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    for name in ("all_reduce_one_shot", "all_reduce_two_shot"):
        monkeypatch.setattr(peer, name, lambda *_, name=name, **__: called.append(name))
    one = PeerToPeer(virtual_peers(2, 1024, "cpu")[1], one_shot_bytes=640)
    assert (one.ranks, one.rank, one.capturable) == (2, 1, True)
    for tokens in (10, 11):
        x = torch.zeros(tokens, 32, dtype=torch.float16)
        one.all_reduce(x, out=x.clone())
    assert called == ["all_reduce_one_shot", "all_reduce_two_shot"]


def test_with_a_copy_engine_all_gathers_are_its_copies() -> None:
    engine = Mock(CopyEngine)
    one = PeerToPeer(virtual_peers(2, 1024, "cpu")[0], copy_engine=engine)
    x, out = torch.zeros(2, 4), torch.zeros(4, 4)
    one.all_gather_rows(x, out=out, num_sms=2)
    engine.all_gather_rows.assert_called_once_with(x, out=out)
    one.all_gather_columns(x, out=out, num_sms=2)
    engine.all_gather_columns.assert_called_once_with(x, out=out)


@pytest.mark.parametrize(("ranks", "tokens", "width"), [(2, 7, 16), (8, 4096, 8192), (3, 5, 51), (8, 1, 8)])
def test_buffers_of_that_size_have_room_for_every_call(ranks: int, tokens: int, width: int) -> None:
    size = buffer_bytes(ranks, tokens, width, 2, one_shot_bytes=64)
    halves = virtual_peers(1, size, "cpu")[0].half_bytes
    rows = -(-tokens // ranks)
    assert halves >= (ranks + 1) * rows * width * 2
    assert halves >= (ranks + 1) * tokens * (width // ranks) * 2
    assert halves >= ranks * 64
