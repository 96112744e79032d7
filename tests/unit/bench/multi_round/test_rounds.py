"""Conversations through the real scheduler, on a device and links that only take time."""

from __future__ import annotations

import pytest
from msgspec import structs

from nanoflow_backend.bench.multi_round.bound import Bound, StepCost
from nanoflow_backend.bench.multi_round.conversations import Conversations, Round, draw_conversations
from nanoflow_backend.bench.multi_round.driver import Driver
from nanoflow_backend.bench.multi_round.summary import summarise
from nanoflow_backend.bench.pretend.engine import PretendEngine
from nanoflow_backend.bench.pretend.host_memory import HostMemory
from nanoflow_backend.scheduler.batch import Delta
from nanoflow_backend.scheduler.limits import SchedulerLimits

COST = StepCost(least_s=0.01, token_s=1e-3, kv_token_s=1e-6)
PAGE_TOKENS = 16


def limits(kv_cache_tokens: int) -> SchedulerLimits:
    return SchedulerLimits(
        dense_batch_tokens=256,
        chunk_tokens=256,
        prompt_tokens=256,
        max_running=32,
        max_queue_size=1000,
        num_pages=kv_cache_tokens // PAGE_TOKENS,
        page_tokens=PAGE_TOKENS,
        max_model_tokens=1024,
    )


def run(
    conversations: Conversations,
    active: int,
    kv_cache_tokens: int = 10**5,
    host: HostMemory | None = None,
    prefix_caching: bool = True,
) -> tuple[Driver, PretendEngine]:
    engine = PretendEngine.before(host, limits(kv_cache_tokens), COST.of_batch, prefix_caching=prefix_caching)
    driver = Driver(conversations, active, vocab_size=1000)
    driver.run(engine, engine.clock, engine.clock.sleep)
    assert not engine.has_work
    return driver, engine


def chat(*rounds: tuple[int, int, float]) -> tuple[Round, ...]:
    return tuple(Round(*turn) for turn in rounds)


def test_each_round_comes_when_the_answer_has_come_and_the_user_has_thought() -> None:
    driver, _ = run(Conversations("x", (chat((40, 10, 0), (20, 10, 30.0), (5, 1, 0.0)),), {}), active=1)
    assert [(r.prompt_tokens, r.output_tokens) for r in driver.answered] == [(40, 10), (70, 10), (85, 1)]
    first, second, third = driver.answered
    assert second.sent_s == pytest.approx(first.ended_s + 30)
    assert third.sent_s == pytest.approx(second.ended_s)
    for r in driver.answered:
        assert r.sent_s < r.first_token_s <= r.ended_s


def test_what_was_said_before_is_of_the_devices_cache_but_for_the_last_page() -> None:
    driver, engine = run(Conversations("x", (chat((40, 10, 0), (20, 10, 0)),), {}), active=1)
    assert [r.cached_tokens for r in driver.answered] == [0, 48]  # 49 of 50 have keys and values
    assert engine.computed_prompt_tokens == 40 + 70 - 48
    assert [r.host_tokens for r in driver.answered] == [0, 0]


def test_so_many_conversations_are_active_and_the_next_begins_when_one_ends() -> None:
    drawn = Conversations("x", tuple(chat((10, 5, 0), (10, 5, 0)) for _ in range(7)), {})
    driver, _ = run(drawn, active=3)
    begins = sorted(r.sent_s for r in driver.answered if r.number == 0)
    ends = sorted(r.ended_s for r in driver.answered if r.number == 1)
    assert begins[:3] == [0.0] * 3
    assert begins[3:] == ends[:4]
    assert driver.last_began_s == begins[-1]
    assert driver.active == 3
    assert len(driver.answered) == 14


def test_answers_of_another_length_are_an_error() -> None:
    class Short(PretendEngine):
        def step(self) -> list[Delta]:
            return [structs.replace(delta, token_ids=()) for delta in super().step()]

    engine = Short.before(None, limits(1000), COST.of_batch)
    driver = Driver(Conversations("x", (chat((10, 5, 0)),), {}), 1, vocab_size=100)
    with pytest.raises(RuntimeError, match="conversation 0, round 0: expected 5 tokens, got 0 and length"):
        driver.run(engine, engine.clock, engine.clock.sleep)


def test_host_memory_saves_what_the_device_forgets() -> None:
    """A device that holds an eighth of the active conversations, and a host that holds all."""
    drawn = draw_conversations("lmsys-like", 45, 768, think_s=0, scale=0.3, seed=1)
    arms = {
        "recomputing": run(drawn, 30, 768, prefix_caching=False),
        "device": run(drawn, 30, 768),
        "host": run(drawn, 30, 768, HostMemory(20_000, load_token_s=1e-6, store_token_s=1e-6)),
        "slow host": run(drawn, 30, 768, HostMemory(20_000, load_token_s=1e-2, store_token_s=1e-6)),
        "loads only": run(drawn, 30, 768, HostMemory(20_000, load_token_s=1e-6, store_token_s=1e-6, loads_only=True)),
    }
    found = {name: summarise(driver, lambda rounds: Bound.of(rounds, COST, 768)) for name, (driver, _) in arms.items()}
    bound = Bound.of(arms["host"][0].answered, COST, 768)
    assert {summary["bound"]["prompt_tokens"] for summary in found.values()} == {bound.prompt_tokens}
    assert found["host"]["share_of_bound"] == pytest.approx(
        found["host"]["rounds_per_s"] / bound.rounds_per_s, rel=1e-3
    )
    tokens = {name: summary["prompt_tokens"] for name, summary in found.items()}
    assert {t["all"] for t in tokens.values()} == {bound.prompt_tokens}
    assert tokens["recomputing"]["computed"] == bound.prompt_tokens
    assert tokens["recomputing"]["device"] == tokens["device"]["host"] == 0
    assert tokens["host"]["host"] > 3 * tokens["host"]["device"]
    kept = bound.prompt_tokens - tokens["host"]["computed"]
    pages_lost = PAGE_TOKENS * bound.rounds
    assert bound.saved_prompt_tokens - pages_lost <= kept <= bound.saved_prompt_tokens
    rates = {name: summary["rounds_per_s"] for name, summary in found.items()}
    assert rates["recomputing"] < 1.05 * rates["device"] < rates["host"] < bound.rounds_per_s
    assert rates["slow host"] > 0.9 * rates["device"], "a load is never slower than recomputing"
    assert tokens["slow host"]["host"] < tokens["host"]["host"] / 2
    assert tokens["loads only"]["computed"] <= tokens["host"]["computed"]


def test_a_summary_has_a_steady_part_if_conversations_began_in_it() -> None:
    drawn = draw_conversations("lmsys-like", 30, 1024, think_s=0)
    driver, _ = run(drawn, 10)
    summary = summarise(driver)
    steady = summary["steady"]
    until_s = max(r.sent_s for r in driver.answered if r.number == 0)
    from_s = sorted(r.ended_s for r in driver.answered)[9]
    assert steady["rounds"] == sum(from_s < r.ended_s <= until_s for r in driver.answered)
    assert steady["wall_s"] == pytest.approx(until_s - from_s, abs=1e-3)
    assert "share_of_bound" not in summary
    assert set(summary["first_token_ms"]["returning_rounds"]) == {"p50", "p90", "p99"}
    assert "too few conversations" in summarise(run(drawn, 30)[0])["steady"]


def test_a_run_that_is_cut_is_steady_up_to_its_end_and_says_what_was_answered() -> None:
    drawn = draw_conversations("lmsys-like", 60, 1024, think_s=0)
    whole, _ = run(drawn, 10)
    limit_s = whole.answered[40].ended_s
    engine = PretendEngine.before(None, limits(10**5), COST.of_batch)
    driver = Driver(drawn, 10, vocab_size=1000)
    driver.run(engine, engine.clock, engine.clock.sleep, limit_s)
    assert driver.answered == whole.answered[:41]
    assert engine.has_work
    summary = summarise(driver)
    assert summary["rounds"] == 41
    assert summary["steady"]["rounds"] == 31
    assert summary["steady"]["wall_s"] == pytest.approx(limit_s - whole.answered[9].ended_s, abs=1e-3)
    engine = PretendEngine.before(None, limits(10**5), COST.of_batch)
    few = Driver(drawn, 50, vocab_size=1000)
    few.run(engine, engine.clock, engine.clock.sleep, limit_s / 2)
    assert 0 < len(few.answered) < 50
    assert "too few conversations" in summarise(few)["steady"]
