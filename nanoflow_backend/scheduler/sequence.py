"""A Sequence is one completion of a request, with a clock of what was scheduled and one of what came back."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from enum import Enum, auto

from nanoflow_backend.request.sampling_params import SamplingParams
from nanoflow_backend.scheduler.account import OpenAccount
from nanoflow_backend.scheduler.batch import FinishReason, TokenLogprobs
from nanoflow_backend.scheduler.tiers.load_plan import LoadPlan


class State(Enum):
    """Where a sequence is on its way from the queue to its end."""

    HELD = auto()  # as WAITING, but not to be admitted yet
    WAITING = auto()  # no slot, no pages
    LOADING = auto()  # waits for pages on their way from a lower tier, and computes nothing meanwhile
    PREFILLING = auto()  # some of its known tokens are not computed yet
    DECODING = auto()  # one token per step
    RETIRING = auto()  # gets no further step; slot and pages go when its last step has returned
    ENDED = auto()  # no slot, no pages, nothing to come


@dataclass(slots=True, eq=False)
class Sequence:
    """`num_computed_tokens` runs ahead: the positions whose K and V are scheduled. `tokens` follows: the ids that are
    known, the prompt's and those that came back. While decoding,
    num_computed_tokens + 1 - len(tokens) samples are in flight.
    """

    id: int  # of its request
    index: int  # among the sequences of its request
    params: SamplingParams  # with a seed
    effective_arrival_s: float  # of the scheduler's clock: its arrival, later by what its priority costs
    arrival_number: int  # counts all sequences
    prompt_tokens: int
    max_total_tokens: int  # prompt and output, by max_tokens and by what the model and the cache can hold
    stop_ids: frozenset[int]  # EOS, unless ignored, and the request's own
    tokens: array[int]  # of C ints: a list would cost nine times the memory, and the collector would walk it

    state: State = State.HELD
    finish_reason: FinishReason | None = None
    fast_path: bool = False  # its next delta tells a token, and nothing else
    preemptions: int = 0
    cached_tokens: int = 0  # prompt tokens that were shared or loaded, when first admitted
    siblings: tuple[Sequence, ...] = ()  # held until this one's prompt is there for them to share
    prompt_logprobs: list[TokenLogprobs] | None = None  # as far as computed, where asked for and not handed over
    account: OpenAccount = field(default_factory=OpenAccount)  # the observer's
    peak_pages: int = 0  # of those that it gave back

    slot: int = -1  # this and all below: of no meaning without a slot
    num_computed_tokens: int = 0
    last_step: int = 0  # the last step that writes its pages, or knows its slot
    pages: list[int] = field(default_factory=list)
    capacity_tokens: int = 0  # tokens that its pages can hold
    shared_pages: int = 0  # of its pages, those that another sequence already held when this one was admitted
    num_published_pages: int = 0  # its leading pages that the prefix index was offered
    load: LoadPlan | None = None  # while pages behind those that are computed come from lower tiers
    hashes: list[bytes] = field(default_factory=list)  # of its leading full pages, as far as asked for; always valid

    @property
    def has_begun(self) -> bool:
        """It, or the sequence that it follows, was admitted."""
        return self.index > 0 or self.preemptions > 0 or self.state not in (State.HELD, State.WAITING)

    @property
    def output_tokens(self) -> int:
        """Output tokens that came back."""
        return len(self.tokens) - self.prompt_tokens


def service_order(sequence: Sequence) -> tuple[float, int]:
    """The key by which sequences are sorted: the lowest is served first and preempted last."""
    return sequence.effective_arrival_s, sequence.arrival_number
