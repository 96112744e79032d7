"""How requests end in the scheduler: stop rules, cancellation, deadlines, and what it refuses. EOS is token 0."""

from __future__ import annotations

from typing import ClassVar

import pytest
from support.scheduler.scheduling import EOS, finish, formed, make, request, returned, step, without_accounts

from nanoflow_backend.bench.reservation import ReserveNothing
from nanoflow_backend.request.sampling_params import InvalidRequest
from nanoflow_backend.scheduler.batch import Delta, FinishReason, Sampled, TokenLogprobs


def test_eos_is_delivered_and_has_no_stop_reason() -> None:
    s = make()
    s.add(request(0, 3))
    assert step(s) == [Delta(0, (7,))]
    assert step(s, EOS) == [Delta(0, (EOS,), finish_reason=FinishReason.STOP)]
    assert not s.has_work
    assert s.stats.overshoot_tokens == 0


def test_eos_seen_one_step_late_costs_one_token_that_is_not_shown() -> None:
    s = make()
    s.add(request(0, 3))
    first, second = formed(s), formed(s)
    assert returned(s, first, EOS)[0].finish_reason == FinishReason.STOP
    assert s.stats.used_pages == 1, "the step in flight still writes the page"
    assert s.schedule() is None
    assert returned(s, second) == []
    assert (s.stats.used_pages, s.stats.overshoot_tokens, s.has_work) == (0, 1, False)


def test_length_is_counted_when_scheduled() -> None:
    s = make()
    s.add(request(0, 3, max_tokens=2))
    first, second = formed(s), formed(s)
    assert s.schedule() is None, "both tokens are on their way"
    assert returned(s, first)[0].finish_reason is None
    assert returned(s, second) == [Delta(0, (7,), finish_reason=FinishReason.LENGTH)]
    assert s.stats.overshoot_tokens == 0


def test_the_model_and_the_cache_end_a_request_too() -> None:
    s = make(max_model_tokens=9)
    s.add(request(0, 6, max_tokens=50))
    assert finish(s) == {0: [7] * 3}
    s = make(num_pages=2)
    s.add(request(0, 6, max_tokens=50))
    assert finish(s) == {0: [7] * 3}, "eight tokens in the cache, and one after them"


def test_stop_token_ids_stop_and_are_named() -> None:
    s = make()
    s.add(request(0, 3, stop_token_ids=(5, EOS)))
    s.add(request(1, 3, stop_token_ids=(5, EOS)))
    first, second = step(s, 5, EOS)
    assert (first.finish_reason, first.stop_reason) == (FinishReason.STOP, 5)
    assert (second.finish_reason, second.stop_reason) == (FinishReason.STOP, None), "EOS is EOS first"


def test_ignore_eos_leaves_the_requests_own_ids() -> None:
    s = make()
    s.add(request(0, 3, ignore_eos=True))
    s.add(request(1, 3, ignore_eos=True, stop_token_ids=(EOS,)))
    first, second = step(s, EOS, EOS)
    assert first.finish_reason is None
    assert (second.finish_reason, second.stop_reason) == (FinishReason.STOP, EOS)


def test_nothing_stops_before_min_tokens() -> None:
    s = make()
    s.add(request(0, 3, min_tokens=3, stop_token_ids=(5,)))
    assert [step(s, token)[0].finish_reason for token in (EOS, 5, EOS)] == [None, None, FinishReason.STOP]


def test_logprobs_travel_with_their_token() -> None:
    s = make()
    s.add(request(0, 3, max_tokens=1))
    s.add(request(1, 3, logprobs=0))
    logprobs = [TokenLogprobs([token], [-0.5], 1) for token in (8, 9)]
    first, second = s.retire(Sampled(formed(s).step, [7, 8], {1: logprobs[0]}))
    assert (first.logprobs, second.logprobs) == (None, [logprobs[0]])
    batch = formed(s)
    assert batch.sampled_slots == [1]
    (last,) = s.retire(Sampled(batch.step, [9], {1: logprobs[1]}))
    assert last.logprobs == [logprobs[1]]


def test_cancel_while_waiting() -> None:
    s = make(max_running=1)
    s.add(request(0, 3))
    s.add(request(1, 3))
    step(s)
    s.cancel(1)
    assert step(s) == [Delta(1, (), finish_reason=FinishReason.CANCELLED), Delta(0, (7,))]
    assert s.stats.waiting_requests == 0


def test_cancel_with_a_step_in_flight_keeps_the_pages_until_it_is_back() -> None:
    s = make()
    s.add(request(0, 20))
    batch = formed(s)
    s.cancel(0)
    s.cancel(0)
    s.check()
    assert s.stats.used_pages == 5
    assert s.schedule() is None
    assert returned(s, batch) == [Delta(0, (), finish_reason=FinishReason.CANCELLED)]
    assert (s.stats.used_pages, s.has_work) == (0, False)


def test_cancel_of_an_unknown_or_ended_request_is_nothing() -> None:
    s = make()
    s.add(request(0, 3, max_tokens=1))
    step(s)
    s.cancel(0)
    s.cancel(12)
    assert not s.has_work
    assert s.retire(None) == []


def test_deadlines_end_waiting_and_running_requests() -> None:
    now = 0.0
    s = make(max_running=1, clock=lambda: now)
    s.add(request(0, 3, deadline=5.0))
    s.add(request(1, 3, deadline=2.0))
    assert [d.request_id for d in step(s)] == [0]
    now = 2.0
    assert step(s) == [Delta(1, (), finish_reason=FinishReason.DEADLINE), Delta(0, (7,))]
    now = 5.0
    assert s.schedule() is None
    assert without_accounts(s.retire(None)) == [Delta(0, (), finish_reason=FinishReason.DEADLINE)]
    assert s.stats.used_pages == 0


def test_a_deadline_does_not_reach_the_next_request_of_that_id() -> None:
    now = 0.0
    s = make(clock=lambda: now)
    s.add(request(0, 3, max_tokens=1, deadline=5.0))
    step(s)
    s.add(request(0, 3, max_tokens=2))
    now = 9.0
    assert finish(s) == {0: [7, 7]}


def test_the_forecast_learns_from_every_end_after_a_token() -> None:
    class Recorder(ReserveNothing):
        lengths: ClassVar[list[int]] = []

        def record(self, output_tokens: int) -> None:
            self.lengths.append(output_tokens)

    s = make(forecast=Recorder(), max_running=3)
    for id, max_tokens in enumerate((9, 9, 3, 9)):
        s.add(request(id, 3, max_tokens=max_tokens))
    step(s)
    step(s, 7, EOS, 7)
    s.cancel(0)  # as at a stop string
    s.cancel(3)  # it never ran
    finish(s)
    assert Recorder.lengths == [2, 2, 3]


def test_bad_requests_are_refused_by_name() -> None:
    s = make(max_model_tokens=200)
    s.add(request(0, 3))
    for bad, message in (
        (request(0, 3), "id: expected one that is not in use, got 0"),
        (request(1, []), "prompt: expected at least one token"),
        (request(1, 129), r"prompt: expected at most 128 tokens .* got 129"),
        (request(1, [3, -1]), r"prompt: expected token ids in 0\.\.2\^31-1, got -1\.\.3"),
        (request(1, [3, 2**31]), "prompt: expected token ids"),
    ):
        with pytest.raises(InvalidRequest, match=message):
            s.add(bad)
    with pytest.raises(InvalidRequest, match="at most 63 tokens"):
        make().add(request(1, 64))
    s.check()
    assert s.stats.waiting_requests == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chunk_tokens": 0}, "chunk_tokens: expected at least 1, got 0"),
        ({"prompt_tokens": 0}, "prompt_tokens: expected at least 1, got 0"),
        ({"num_pages": 0}, "num_pages"),
        ({"max_model_tokens": 1}, "max_model_tokens"),
        ({"dense_batch_tokens": 3}, r"dense_batch_tokens: expected at least max_running \(4\), got 3"),
    ],
)
def test_bad_settings_are_refused_by_name(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_results_of_another_step_are_refused() -> None:
    s = make()
    with pytest.raises(ValueError, match="step 1 came back, and none is in flight"):
        s.retire(Sampled(1, []))
    s.add(request(0, 3))
    formed(s)
    with pytest.raises(ValueError, match="expected 1 tokens of step 1, got 0 of step 1"):
        s.retire(Sampled(1, []))
