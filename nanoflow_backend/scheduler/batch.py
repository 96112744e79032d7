"""Batch is the frozen decision of one step, in ints, and crosses the socket to every rank as it is.

Rows of a batch, as it lists them: first one token for each decode, then the tokens of each prefill chunk, request by
request in ascending position. The rows that are sampled are, in this order, all decodes and the prefills with `sample`.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

from nanoflow_backend.kvcache.tier import Transfer, TransferReport
from nanoflow_backend.request.sampling_params import SamplingParams
from nanoflow_backend.scheduler.account import Account


class Admission(msgspec.Struct, frozen=True, array_like=True):
    """A request takes a slot: the row of the page table, of the sample buffer and of the sampling state.

    One that was preempted is admitted again, with the same `prompt_tokens` and seed: positions go on where they were.
    """

    slot: int
    prompt_tokens: int  # output token k = 0, 1, ... is sampled from the row at position prompt_tokens + k - 1
    params: SamplingParams  # its seed is set: the scheduler draws one where the client gave none
    tokens: list[int] = []  # all known ones, where `params.reads_tokens`; after a preemption also what was generated


class Prefill(msgspec.Struct, frozen=True, array_like=True):
    """Consecutive known tokens of one request, at positions start .. start + len(token_ids) - 1.

    They are the prompt's, and after a preemption also those that the request had generated.
    """

    slot: int
    start: int
    token_ids: list[int]
    sample: bool  # the chunk ends the known tokens: sample from its last row


class Batch(msgspec.Struct, frozen=True, array_like=True):
    """What one step computes. One that computes nothing begins transfers, or waits until one that has begun ends.

    Decode inputs are not here: the device gathers them from the slot's last sample.
    """

    step: int
    decode_slots: list[int]
    decode_positions: list[int]  # of the token that is read, whose K and V this step writes
    prefills: list[Prefill]
    page_table: list[tuple[int, int, int]]  # entries that are new in this step: (slot, index, page)
    admitted: list[Admission]
    transfers: list[Transfer] = []  # of pages between tiers, that begin beside the step
    returned: int = 0  # the last step that had come back when this one was formed: transfers begin after its end

    @property
    def tokens(self) -> int:
        return len(self.decode_slots) + sum(len(p.token_ids) for p in self.prefills)

    @property
    def decode_kv_tokens(self) -> int:
        """Tokens of the KV cache that its decodes read: each those before it, and itself."""
        return sum(self.decode_positions) + len(self.decode_positions)

    @property
    def sampled_slots(self) -> list[int]:
        return self.decode_slots + [p.slot for p in self.prefills if p.sample]


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities of one sampled token: itself first, then the most likely ones, best first."""

    token_ids: list[int]
    logprobs: list[float]
    sampled_rank: int  # 1 is the most likely


class PromptScores(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities of consecutive prompt tokens, from `position` on, each given those before it."""

    slot: int
    position: int
    tokens: list[TokenLogprobs]


class Sampled(msgspec.Struct, frozen=True, array_like=True):
    """What a step sampled, one entry for each of the batch's `sampled_slots`; a step that sampled nothing has none."""

    step: int
    token_ids: list[int]
    logprobs: dict[int, TokenLogprobs] = {}  # by slot, for requests that asked
    prompt_scores: list[PromptScores] = []  # of prefill chunks, for requests that asked
    transfers: TransferReport | None = None  # None: there are no tiers below the device


class FinishReason(StrEnum):
    """Why a sequence got its last delta."""

    STOP = "stop"  # EOS, a stop token id or a stop string
    LENGTH = "length"
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    QUEUE_TIMEOUT = "queue_timeout"  # it never ran
    REFUSED = "refused"  # it turned out to be invalid: nothing of it is to be shown


class Delta(msgspec.Struct, omit_defaults=True, rename={"request_id": "r", "token_ids": "t"}, gc=False):
    """A sequence's news of one step. Its last one carries `finish_reason`; every sequence gets exactly one such.

    There are a thousand in a step, nearly all of two fields: the others are not sent, and there is no cycle to collect.
    """

    request_id: int
    token_ids: tuple[int, ...]  # with the EOS or stop id that ended it
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None  # the stop token id; None for EOS
    cached_tokens: int = 0  # prompt tokens served from the prefix cache; with the first token
    index: int = 0  # of the sequence, among the `n` of its request
    prompt_logprobs: list[TokenLogprobs] | None = None  # of all prompt tokens but the first, with the first token
    account: Account | None = None  # in the last one
