"""These msgspec structs cross the channels between the leader, the other hosts, and the ranks on each.

After them come, for each step, a Batch and its Masks (None: nothing is forbidden). Ranks answer nothing to those:
sampling is deterministic, so all of them draw the same ids.
"""

from __future__ import annotations

import msgspec

from nanoflow_backend.config.settled import Settled


class StartRank(msgspec.Struct, frozen=True):
    """The first message to a rank."""

    settled: Settled
    rank: int
    rendezvous: str  # where the group's members find each other: a file of this host, or HOST:PORT
    interface: str  # of the network, over which they talk


class Progress(msgspec.Struct, frozen=True):
    """What a rank says of itself, or another host of all of its ranks: first, that it is about to meet the others;
    then, that its weights are loaded. With an error, at any time: a rank has ended, or is about to."""

    error: str | None = None


class Welcome(msgspec.Struct, frozen=True):
    """The leader's first message to another host, which answers with Joined."""

    facts: dict[str, str]  # what the hosts must have in common; see agreement.py
    settled: msgspec.Raw  # a Settled, to be read by the same code alone
    schedule: bytes | None  # content of the file that it names, where it does


class Joined(msgspec.Struct, frozen=True):
    """What the host has found: it can take part, or what differs."""

    error: str | None = None


class Begin(msgspec.Struct, frozen=True):
    """All hosts have joined: start your ranks. They answer with Progress."""

    rendezvous: str  # as in StartRank
