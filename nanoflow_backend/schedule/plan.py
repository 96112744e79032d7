"""A Schedule is Launches in order: which operation runs on which tokens and SMs, in which lane, after what."""

from __future__ import annotations

import msgspec
from msgspec.structs import replace

from nanoflow_backend.graph.collectives import AllReduceForm
from nanoflow_backend.graph.nano_batch import NanoOperation


class ScheduleError(ValueError):
    """A schedule that would compute something else than the model: the message names the launch and the rule."""


class Wait(msgspec.Struct, frozen=True, array_like=True, order=True):
    """Start only when launch number `launch` has ended, of the same layer or of `layers_back` layers before."""

    launch: int
    layers_back: int = 0


class Launch(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """One operation on the tokens start .. stop - 1. Launches of a lane run one after the other."""

    operation: str
    start: int
    stop: int
    lane: str
    layers_ahead: int = 0  # how far this launch runs ahead of the others of its period
    sms: int | None = None  # a cap; None: all of the device
    waits: tuple[Wait, ...] = ()

    @property
    def nano(self) -> NanoOperation:
        return NanoOperation(self.operation, self.start, self.stop)


class Group(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Rows of a batch, up to `stop`, that hold this share of its decoding rows: those first, then prompts' tokens.

    Without groups all decodes come first, and the nano-batch that has them has all reading of the KV cache.
    """

    stop: int
    decodes: float


class Schedule(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """The launches of one layer on a batch of `tokens`, repeated for every layer (a cyclic plan, paper section 4.1).

    Two lanes may run apart from each other as far as waits let them, from one layer into the next.
    What overlap hides is the reading of the KV cache by decodes, so a plan may ask for some: `least_decode_kv_tokens`
    are the contexts of a batch's decodes together, each with its own token: attention's time follows them, be it few
    long contexts or many short ones. It is not scaled as boundaries are: a smaller batch has less work that the same
    reading would add to.
    """

    tokens: int
    launches: tuple[Launch, ...]
    granularity: int = 1  # boundaries are multiples of it
    all_reduces: dict[str, AllReduceForm] = {}  # those that do not run as one operation, by name
    partition: dict[str, int] = {}  # lane -> SMs that are its own; empty: all lanes share the device
    groups: tuple[Group, ...] = ()  # in which order a batch's rows lie; empty: all decodes first
    least_decode_kv_tokens: int = 0  # a batch whose decodes read fewer runs under a later plan of the same `tokens`

    def __post_init__(self) -> None:
        for name, least in (("tokens", 1), ("granularity", 1), ("least_decode_kv_tokens", 0)):
            if getattr(self, name) < least:
                raise ScheduleError(f"{name}: expected an integer >= {least}, got {getattr(self, name)}")

    def holds(self, tokens: int, decode_kv_tokens: int) -> bool:
        """A batch of so many tokens may run under it, whose decodes read so many tokens of the KV cache."""
        return tokens <= self.tokens and decode_kv_tokens >= self.least_decode_kv_tokens

    @property
    def lanes(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(launch.lane for launch in self.launches))

    def unroll(self, num_layers: int) -> list[tuple[int, int]]:
        """(layer, launch number) in the order of issue, for a model of `num_layers`."""
        ahead = max((launch.layers_ahead for launch in self.launches), default=0)
        return [
            (period + launch.layers_ahead, number)
            for period in range(-ahead, num_layers)
            for number, launch in enumerate(self.launches)
            if 0 <= period + launch.layers_ahead < num_layers
        ]

    def awaited(self, num_layers: int) -> list[list[int]]:
        """For each step of `unroll` the steps in other lanes that it waits for, as places in the order of issue."""
        steps = self.unroll(num_layers)
        index = {step: place for place, step in enumerate(steps)}
        lane = [launch.lane for launch in self.launches]
        return [
            [
                index[layer - wait.layers_back, wait.launch]
                for wait in self.launches[number].waits
                if wait.layers_back <= layer and lane[wait.launch] != lane[number]
            ]
            for layer, number in steps
        ]

    def sms(self, launch: Launch) -> int | None:
        """How many SMs a launch may fill; None: all of the device."""
        return launch.sms or self.partition.get(launch.lane)

    def fit(self, tokens: int) -> list[tuple[int, int]]:
        """The launches' token ranges when a batch has fewer `tokens`: every boundary scaled, some ranges empty.

        Scaling is monotone, so ranges that had no token in common still have none: what was valid stays valid.
        """
        return [(self._scaled(launch.start, tokens), self._scaled(launch.stop, tokens)) for launch in self.launches]

    def fit_groups(self, tokens: int) -> tuple[Group, ...]:
        """The groups of a batch of `tokens`, their boundaries scaled as those of launches are."""
        return tuple(replace(group, stop=self._scaled(group.stop, tokens)) for group in self.groups)

    def _scaled(self, boundary: int, tokens: int) -> int:
        grains = (2 * boundary * tokens + self.tokens * self.granularity) // (2 * self.tokens * self.granularity)
        return tokens if boundary == self.tokens else min(grains * self.granularity, tokens)
