"""These msgspec structs cross the channels between the leader, the other hosts, and the ranks on each.

After them come, for each step, a Batch and its Masks (None: nothing is forbidden). Sampling is deterministic, so all
ranks draw the same ids and answer nothing, unless there are tiers below the device: then each reports its transfers.
"""

from __future__ import annotations

import msgspec

from nanoflow_backend.config.settled import Settled
from nanoflow_backend.kvcache.tier import TransferReport


class StartRank(msgspec.Struct, frozen=True):
    """The first message to a rank."""

    settled: Settled
    rank: int
    rendezvous: str  # where the group's members find each other: a file of this host, or HOST:PORT
    interface: str  # of the network, over which they talk


class Progress(msgspec.Struct, frozen=True, tag=True):
    """What a rank says of itself, or another host of all of its ranks: first, that it is about to meet the others;
    then, that its weights are loaded. With an error, at any time: a rank has ended, or is about to."""

    error: str | None = None


class RankReport(msgspec.Struct, frozen=True, tag=True):
    """What has come of one rank's transfers, before its second Progress and after each step; hosts hand it on."""

    rank: int
    transfers: TransferReport


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
