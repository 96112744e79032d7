"""Requests share the pages of a common prefix, from the step after the one that fills them."""

from __future__ import annotations

from support.scheduler.scheduling import finish, formed, make, request, returned, step


def test_a_prefix_is_shared_from_the_step_after_the_one_that_fills_it() -> None:
    s = make(dense_batch_tokens=32)
    prompt = list(range(1, 11))
    s.add(request(0, prompt))
    s.add(request(1, prompt))
    first = formed(s)
    assert [p.start for p in first.prefills] == [0, 0], "never within the step"
    s.add(request(2, prompt))
    second = formed(s)
    assert [p.start for p in second.prefills] == [8], "but before its results are back"
    returned(s, first)
    assert {d.request_id: d.cached_tokens for d in returned(s, second)} == {0: 0, 1: 0, 2: 8}
    assert (s.stats.prefix_query_tokens, s.stats.prefix_hit_tokens) == (30, 8)


def test_generated_tokens_are_shared_in_the_next_round() -> None:
    s = make()
    s.add(request(0, [1, 2, 3], max_tokens=6))
    assert finish(s) == {0: [7] * 6}
    s.add(request(1, [1, 2, 3, 7, 7, 7, 7, 7, 7, 5]))
    assert formed(s).prefills[0].start == 8


def test_a_shared_page_lives_as_long_as_its_last_reader() -> None:
    s = make()
    prompt = list(range(1, 10))
    s.add(request(0, prompt, max_tokens=2))
    step(s)
    s.add(request(1, prompt, max_tokens=5))
    step(s)
    assert s.stats.used_pages == 3, "request 0 is gone; two shared pages and one of its own"
    finish(s)
    assert s.stats.used_pages == 0


def test_without_prefix_caching_nothing_is_kept() -> None:
    s = make(prefix_caching=False)
    s.add(request(0, 10))
    finish(s)
    assert s.stats.cached_pages == 0
