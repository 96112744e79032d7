"""Ranks of the peer-to-peer kernels as streams of one process on one GPU."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from nanoflow_kernels.collectives.peers import Peers, virtual_peers


class VirtualRanks:
    """A stream for each rank. What waits for ever is ended by the abort word, and fails the test."""

    def __init__(self, ranks: int, buffer_bytes: int) -> None:
        self.peers = virtual_peers(ranks, buffer_bytes, "cuda")
        self.streams = [torch.cuda.Stream() for _ in range(ranks)]
        torch.cuda.synchronize()

    @property
    def abort(self) -> torch.Tensor:
        """[1] int32, the word that all ranks of this process share."""
        return self.peers[0].abort

    def launch(self, call: Callable[[Peers], object], delays: list[int] | None = None) -> None:
        """Issue `call` on each rank's stream, behind a delay of so many cycles."""
        for peers, stream in zip(self.peers, self.streams, strict=True):
            with torch.cuda.stream(stream):
                if delays and delays[peers.rank]:
                    torch.cuda._sleep(delays[peers.rank])
                call(peers)

    @contextmanager
    def ended_within(self, seconds: float) -> Iterator[None]:
        """What is launched in this block ends in time.

        Raises:
            AssertionError: it did not, and was aborted.
        """
        late = threading.Timer(seconds, lambda: self.abort.fill_(1))
        late.start()
        try:
            yield
            torch.cuda.synchronize()
        except BaseException:
            self.abort.fill_(1)  # what has been launched waits for what has not
            raise
        finally:
            late.cancel()
        assert self.abort.item() == 0, f"ranks still waited for each other after {seconds} s"

    def poison(self) -> None:
        """Fill all buffers with NaN; no call may be under way."""
        torch.cuda.synchronize()
        first = self.peers[0]
        begin = int(first.buffers[0]) - first.memory.data_ptr()  # type: ignore[attr-defined]
        first.memory[begin : begin + first.ranks * first.buffer_bytes] = 0xFF  # type: ignore[index]
        torch.cuda.synchronize()
