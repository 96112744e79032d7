"""The engine on other executors than the one that computes a model; and its step as the documentation shows it."""

import inspect
import random
import textwrap
from collections.abc import Callable

import pytest
from support.places import DEMO_MODEL, ROOT
from support.scheduler.ledger_executor import LedgerExecutor, Story

from nanoflow_backend.config.engine_config import EngineConfig
from nanoflow_backend.config.settled import Settled
from nanoflow_backend.engine import LLM, Engine, SamplingParams


def ledger(settled: Settled, on_rank_death: Callable[[str], None]) -> LedgerExecutor:
    config = settled.config
    assert config.kv_cache_tokens is not None
    return LedgerExecutor(config.kv_cache_tokens // config.page_tokens, config.page_tokens)


@pytest.mark.parametrize("on", [True, False])
def test_an_engine_on_arithmetic_tells_every_story(on: bool) -> None:
    """Prompts that share beginnings, in chunks, on few pages: the executor notices wrong pages and wrong tokens."""
    rng = random.Random(4)
    fields = {"page_tokens": 4, "kv_cache_tokens": 160, "dense_batch_tokens": 24, "chunk_tokens": 7}
    config = EngineConfig.resolve({"model": str(DEMO_MODEL), "async_scheduling": on, **fields}, relative_to=ROOT)
    engine = Engine(config, make_executor=ledger)
    prompts = [[rng.randrange(12) for _ in range(rng.randint(1, 20))] for _ in range(30)]
    prompts = [begun for prompt in prompts for begun in (prompt, [*prompt[: rng.randint(1, len(prompt))], 1])]
    stories = [Story.of(prompt, seed, 42, frozenset(), 0) for seed, prompt in enumerate(prompts)]
    engine.executor.stories = dict(enumerate(stories))
    params = [SamplingParams(max_tokens=rng.randint(1, 40), seed=n, ignore_eos=True) for n in range(len(prompts))]
    completions = LLM(engine).generate(prompts, params)
    for completion, prompt, story, asked in zip(completions, prompts, stories, params, strict=True):
        assert completion.token_ids == story.tokens[len(prompt) : len(prompt) + asked.max_tokens]
    assert any(completion.num_cached_tokens for completion in completions)
    engine.scheduler.check()
    engine.close()
    assert "on arithmetic" in engine.description


def test_the_documentation_shows_lines_of_the_step_in_their_order() -> None:
    _, _, block = (ROOT / "docs" / "architecture.md").read_text().partition("```python\n")
    shown = block.partition("```")[0].splitlines()
    assert len(shown) == 9
    source = iter(textwrap.dedent(inspect.getsource(Engine.step)).splitlines())
    assert [line for line in shown if line not in source] == []  # each is looked for after the one before
