"""Pages are computed from the front while others load from the back: so a load is never slower than computing."""

from __future__ import annotations

import pytest
from support.scheduler.tiered import PAGE_TOKENS, TieredScheduler, contents

from nanoflow_backend.kvcache.tier import Move
from nanoflow_backend.scheduler.tiers.load_plan import LoadPlan
from nanoflow_backend.scheduler.tiers.rates import Rate, Rates

CHAIN_PAGES = 40
PROMPT = [*range(100, 100 + CHAIN_PAGES * PAGE_TOKENS), 1]
STEP_TOKENS = 8
TOKEN_S = 1.0  # to compute one


def first_token_s(load_page_s: float | None, known_page_s: float | None = None) -> tuple[float, int]:
    """When a request gets its first token whose pages take so long to load, one after the other, and what is computed.

    None: it computes everything. `known_page_s` is what was measured before, if that is something else.
    """
    s = TieredScheduler(
        num_pages=50,
        host_slots=60,
        tier_limits={"load_pages": 16},
        dense_batch_tokens=STEP_TOKENS,
        chunk_tokens=STEP_TOKENS,
        prompt_tokens=STEP_TOKENS,
        max_model_tokens=100,
    )
    if load_page_s is not None:
        parent = None
        for content in contents(PROMPT):
            s.host.reserve(content, parent)
            s.host.commit(content)
            parent = content
        s.lower.rates.load.measured(1, load_page_s if known_page_s is None else known_page_s)
        s.lower.rates.prefill.measured(1, TOKEN_S)
    s.add(0, PROMPT)
    ends_s: dict[int, float] = {}  # of loads, by id
    link_free_s, computed = 0.0, 0
    while True:
        batch = s.form()
        for transfer in batch.transfers:
            if transfer.move is Move.LOAD:
                link_free_s = max(link_free_s, s.now_s) + (load_page_s or 0.0)
                ends_s[transfer.id] = link_free_s
        computed += batch.tokens
        if not batch.tokens:
            s.now_s = max(s.now_s, min(ends_s[t.id] for t in s.transfers if t.move is Move.LOAD))
        s.now_s += batch.tokens * TOKEN_S
        late = [t for t in s.transfers if t.move is not Move.LOAD or ends_s[t.id] > s.now_s]
        s.transfers = [t for t in s.transfers if t not in late]
        deltas = s.end(batch, load_page_s=load_page_s or 0.0)
        s.transfers += late
        if deltas:
            return s.now_s, computed


@pytest.mark.parametrize("load_page_s", [0.01, 0.5, 1.0, 2.0, 4.0, 16.0, 1000.0])
def test_a_load_is_never_slower_than_computing_and_both_together_are_faster_than_either(load_page_s: float) -> None:
    recomputed_s, _ = first_token_s(None)
    assert recomputed_s == len(PROMPT) * TOKEN_S
    took_s, computed = first_token_s(load_page_s)
    page_s = PAGE_TOKENS * TOKEN_S
    ideal_s = CHAIN_PAGES * load_page_s * page_s / (load_page_s + page_s)
    step_s = STEP_TOKENS * TOKEN_S
    assert took_s <= recomputed_s
    assert ideal_s <= took_s <= ideal_s + step_s + max(load_page_s, 1)
    assert computed < len(PROMPT) or load_page_s == 1000.0


def test_a_fast_load_leaves_nothing_to_compute_but_the_end() -> None:
    assert first_token_s(0.001)[1] == 1


def test_a_link_that_is_slower_than_was_measured_costs_what_was_on_its_way() -> None:
    """Sixteen pages were begun before anybody knew; meanwhile the others are computed."""
    took_s, _ = first_token_s(16.0, known_page_s=0.01)
    assert took_s <= 16 * 16.0 + STEP_TOKENS * TOKEN_S + 1


def test_how_many_pages_to_compute_so_that_both_ends_meet() -> None:
    rates = Rates(page_tokens=4)
    assert rates.pages_to_compute(10, 0, 0) == 0, "nothing is known"
    rates.prefill.measured(100, 25.0)  # a page in 1 s
    assert rates.pages_to_compute(10, 0, 0) == 0
    rates.load.measured(10, 10.0)
    assert rates.pages_to_compute(10, 0, 0) == 5
    assert rates.pages_to_compute(10, 4, 0) == 7, "four are to be loaded before those"
    assert rates.pages_to_compute(10, 90, 0) == 10
    rates.read.measured(1, 2.0)
    assert rates.pages_to_compute(10, 0, 10) == 8, "3 s a page from the disk: two come while eight are computed"
    assert rates.pages_to_compute(0, 3, 0) == 0
    rates.step.measured(1, 31.0)
    assert rates.pages_to_compute(10, 0, 10) == 0, "all will be there when the next step begins"
    assert rates.pages_to_compute(10, 1, 10) == 8


def test_swapping_is_cheaper_where_a_page_goes_and_comes_faster_than_it_is_computed() -> None:
    rates = Rates(page_tokens=4)
    assert rates.is_swap_cheaper(3)
    rates.prefill.measured(4, 1.0)
    rates.store.measured(1, 0.4)
    assert rates.is_swap_cheaper(3), "a load is taken to be like a store"
    rates.load.measured(1, 0.7)
    assert not rates.is_swap_cheaper(3)


def test_a_rate_follows_what_changes() -> None:
    rate = Rate()
    assert rate.seconds_each is None
    for _ in range(50):
        rate.measured(2, 2.0)
    assert rate.seconds_each == pytest.approx(1.0)
    for _ in range(50):
        rate.measured(2, 20.0)
    assert rate.seconds_each == pytest.approx(10.0, rel=0.06)
    rate.measured(0, 5.0)
    assert rate.seconds_each == pytest.approx(10.0, rel=0.06)


def test_a_plan_ends_where_a_load_fails() -> None:
    plan = LoadPlan(3, [b"d", b"e", b"f"], [7, 8, 9], parent=b"c")
    assert [(plan.take(), plan.page(plan.back), plan.content(plan.back)) for _ in range(2)] == [
        (5, 9, b"f"),
        (4, 8, b"e"),
    ]
    plan.arrived(5)
    plan.failed(4)
    assert (plan.unissued, plan.end, plan.met) == (1, 4, False)
    plan.claim(4)
    assert plan.met
    assert (plan.back, plan.end) == (4, 4), "nothing of it was of use"
    assert [plan.content_before(index) for index in (3, 4)] == [b"c", b"d"]


@pytest.mark.parametrize("cheaper", [True, False])
def test_preempted_sequences_swap_out_if_that_is_cheaper_and_lose_nothing_either_way(cheaper: bool) -> None:
    s = TieredScheduler(num_pages=6, tier_limits={"keep": "seen_twice"})
    s.lower.rates.prefill.measured(1, 1.0 if cheaper else 1e-9)
    s.lower.rates.load.measured(1, 1e-3)
    s.lower.rates.store.measured(1, 1e-3)
    for id in range(2):
        s.add(id, [100 * id + i for i in range(5)], max_tokens=6)
    stored_before_it_came_back = admissions = 0
    tokens = {0: 0, 1: 0}
    while s.scheduler.has_work:
        batch = s.form()
        admissions += len(batch.admitted)
        stored_before_it_came_back += admissions == 2 and sum(t.move is Move.STORE for t in batch.transfers)
        for delta in s.end(batch):
            tokens[delta.request_id] += len(delta.token_ids)
    assert s.scheduler.stats.preemptions > 0
    assert tokens == {0: 6, 1: 6}
    assert (stored_before_it_came_back > 0) == cheaper, "each content was seen once by then"
