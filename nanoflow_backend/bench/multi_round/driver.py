"""Driver sends rounds of conversations to an engine: the next one when the answer has come and its user has thought.

An answer's last token is new in the next prompt: the engine has sampled it, and nothing has read it.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from nanoflow_backend.bench.multi_round.conversations import Conversations
from nanoflow_backend.request.request import Request
from nanoflow_backend.request.sampling_params import SamplingParams
from nanoflow_backend.scheduler.batch import Delta, FinishReason


class Steps(Protocol):
    """What a driver needs of an engine."""

    def add(self, request: Request) -> None: ...

    def step(self) -> list[Delta]: ...

    @property
    def has_work(self) -> bool: ...


@dataclass
class AnsweredRound:
    """A round, in seconds of the engine's clock."""

    conversation: int
    number: int  # in its conversation, from 0
    prompt_tokens: int
    new_tokens: int  # of these, those that no earlier round had; an answer's last token was sampled, and not computed
    output_tokens: int
    sent_s: float
    first_token_s: float = 0.0
    ended_s: float = 0.0
    cached_tokens: int = 0  # of the prompt, not computed
    host_tokens: int = 0  # of these, loaded from host memory
    disk_tokens: int = 0  # likewise, from the disk
    answer: list[int] = field(default_factory=list)


class Driver:
    """Keeps `active` conversations alive; when one has ended, the next begins.

    Attributes:
        answered: rounds in the order in which they ended.
        began_s: when the first conversation began.
        last_began_s: when the last one did: until then so many were active.
    """

    def __init__(
        self,
        conversations: Conversations,
        active: int,
        vocab_size: int,
        seed: int = 0,
        on_answer: Callable[[AnsweredRound], None] = lambda answered: None,
    ) -> None:
        """`seed` is of the prompts. `on_answer` is called for each round that ends."""
        self._on_answer = on_answer
        self._conversations, self._seed = conversations.rounds, seed
        self._vocabulary = range(vocab_size)
        self._next = 0
        self._active = active
        self._due: list[tuple[float, int, int]] = []  # when, conversation, round: a heap
        self._said: dict[int, list[int]] = {}  # by conversation: all tokens up to now
        self._waiting: dict[int, AnsweredRound] = {}  # by request
        self._requests = 0
        self.answered: list[AnsweredRound] = []
        self.began_s = self.last_began_s = 0.0

    @property
    def active(self) -> int:
        """Conversations at a time, while there are more to come."""
        return min(self._active, len(self._conversations))

    @property
    def steady_until_s(self) -> float:
        """When there were fewer conversations than `active`, or the run was cut."""
        return self.last_began_s if self._next == len(self._conversations) else self.answered[-1].ended_s

    def run(
        self,
        engine: Steps,
        clock: Callable[[], float],
        sleep: Callable[[float], None],
        limit_s: float = math.inf,
    ) -> None:
        """Until all conversations have ended, or for so long: then the engine still has requests.

        Raises:
            RuntimeError: an answer is not as long as it was asked to be.
        """
        self.began_s = clock()
        for _ in range(self.active):
            self._begin(self.began_s)
        while (self._due or self._waiting) and clock() < self.began_s + limit_s:
            self._send(engine, clock())
            if engine.has_work:
                self._tell(engine.step(), clock())
            elif self._due:
                sleep(max(0.0, self._due[0][0] - clock()))

    def _begin(self, now_s: float) -> None:
        if self._next < len(self._conversations):
            self._said[self._next] = []
            heapq.heappush(self._due, (now_s, self._next, 0))
            self._next += 1
            self.last_began_s = now_s

    def _send(self, engine: Steps, now_s: float) -> None:
        while self._due and self._due[0][0] <= now_s:
            _, conversation, number = heapq.heappop(self._due)
            turn = self._conversations[conversation][number]
            draw = random.Random(f"{self._seed} {conversation} {number}")
            said = self._said[conversation]
            said += draw.choices(self._vocabulary, k=turn.input_tokens)
            params = SamplingParams(max_tokens=turn.output_tokens, ignore_eos=True, temperature=0.0)
            request = self._requests
            self._requests += 1
            self._waiting[request] = AnsweredRound(
                conversation, number, len(said), turn.input_tokens, turn.output_tokens, now_s
            )
            engine.add(Request(request, list(said), params))

    def _tell(self, deltas: Iterable[Delta], now_s: float) -> None:
        for delta in deltas:
            answered = self._waiting[delta.request_id]
            if not answered.answer:
                answered.first_token_s = now_s
                answered.cached_tokens = delta.cached_tokens
            answered.answer += delta.token_ids
            if delta.finish_reason is not None:
                self._end(self._waiting.pop(delta.request_id), delta, now_s)

    def _end(self, answered: AnsweredRound, delta: Delta, now_s: float) -> None:
        if delta.finish_reason is not FinishReason.LENGTH or len(answered.answer) != answered.output_tokens:
            raise RuntimeError(
                f"conversation {answered.conversation}, round {answered.number}: expected {answered.output_tokens} "
                f"tokens, got {len(answered.answer)} and {delta.finish_reason}"
            )
        if delta.account is not None:
            answered.host_tokens, answered.disk_tokens = delta.account.host_tokens, delta.account.disk_tokens
        answered.ended_s = now_s
        self.answered.append(answered)
        self._on_answer(answered)
        conversation, number = answered.conversation, answered.number + 1
        if number < len(self._conversations[conversation]):
            self._said[conversation] += answered.answer
            due_s = now_s + self._conversations[conversation][number].think_s
            heapq.heappush(self._due, (due_s, conversation, number))
        else:
            del self._said[conversation]
            self._begin(now_s)
