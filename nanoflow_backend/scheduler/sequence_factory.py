"""SequenceFactory makes the sequences of a request, or says why the request could never run to its end."""

from __future__ import annotations

import random
from array import array

import msgspec

from nanoflow_backend.request.request import Request
from nanoflow_backend.request.sampling_params import InvalidRequest
from nanoflow_backend.scheduler.sequence import Sequence


def check_can_run(prompt_tokens: int, max_model_tokens: int, cache_tokens: int, place: str = "") -> None:
    """Raises: InvalidRequest, where a prompt leaves no token for output, or is more than the KV cache holds.

    `place` says at the end of the message which prompt of several it is.
    """
    longest = min(max_model_tokens - 1, cache_tokens)
    if prompt_tokens > longest:
        raise InvalidRequest(
            f"prompt: expected at most {longest} tokens (the model has {max_model_tokens}, one of them for "
            f"output; the KV cache has {cache_tokens}), got {prompt_tokens}{place}"
        )


class SequenceFactory:
    """Numbers the arrivals, settles in which order they are served, and draws a seed where the client gave none.

    Each step of priority counts as having come `priority_aging_s` later. So nobody starves: whatever comes after that
    time, however urgent, comes after.
    """

    def __init__(
        self,
        max_model_tokens: int,
        cache_tokens: int,
        eos_token_ids: frozenset[int],
        seed: int,
        priority_aging_s: float,
    ) -> None:
        self._max_model_tokens = max_model_tokens
        self._cache_tokens = cache_tokens
        self._eos_token_ids = eos_token_ids
        self._seeds = random.Random(seed)
        self._priority_aging_s = priority_aging_s
        self._arrivals = 0

    def make_sequences(self, request: Request, arrived_s: float) -> list[Sequence]:
        """Its `n` sequences, held. All but the first are the first one's siblings.

        Raises:
            InvalidRequest: it could never run; the message names the field and what was expected.
        """
        self._validate(request.prompt)
        sequences = [self._sequence(request, index, arrived_s) for index in range(request.params.n)]
        sequences[0].siblings = tuple(sequences[1:])
        return sequences

    def _sequence(self, request: Request, index: int, arrived_s: float) -> Sequence:
        params, prompt_tokens = request.params.of_sequence(index), len(request.prompt)
        if params.seed is None:  # sampling is a function of (seed, position): a preempted request repeats its tokens
            params = msgspec.structs.replace(params, seed=self._seeds.getrandbits(63))
        stop_ids = frozenset() if params.ignore_eos else self._eos_token_ids
        self._arrivals += 1
        return Sequence(
            id=request.id,
            index=index,
            params=params,
            effective_arrival_s=arrived_s + request.priority * self._priority_aging_s,
            arrival_number=self._arrivals,
            prompt_tokens=prompt_tokens,
            # nobody reads K and V of the last token: it needs no room in the cache
            max_total_tokens=min(prompt_tokens + params.max_tokens, self._max_model_tokens, self._cache_tokens + 1),
            stop_ids=stop_ids.union(params.stop_token_ids) if params.stop_token_ids else stop_ids,
            tokens=array("i", request.prompt),
            prompt_logprobs=None if params.prompt_logprobs is None else [],
        )

    def _validate(self, prompt: list[int]) -> None:
        if not prompt:
            raise InvalidRequest("prompt: expected at least one token, got none")
        check_can_run(len(prompt), self._max_model_tokens, self._cache_tokens)
        if min(prompt) < 0 or max(prompt) >= 2**31:
            raise InvalidRequest(f"prompt: expected token ids in 0..2^31-1, got {min(prompt)}..{max(prompt)}")
