"""The engine on other executors than the one that computes a model; and its step as the documentation shows it."""

import inspect
import random
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from ledger_executor import LedgerExecutor, Story

from nanoflow_backend.config.engine_config import EngineConfig
from nanoflow_backend.engine import LLM, Engine, SamplingParams
from nanoflow_backend.engine.settle import Settled

ROOT = Path(__file__).parents[3]
DEMO = ROOT / "demo" / "tiny-llama"


def ledger(settled: Settled, on_rank_death: Callable[[str], None]) -> LedgerExecutor:
    config = settled.config
    assert config.kv_cache_tokens is not None
    return LedgerExecutor(config.kv_cache_tokens // config.page_tokens, config.page_tokens)


@pytest.mark.parametrize("on", [True, False])
def test_an_engine_on_arithmetic_tells_every_story(on: bool) -> None:
    """Prompts that share beginnings, in chunks, on few pages: the executor notices wrong pages and wrong tokens."""
    rng = random.Random(4)
    fields = {"page_tokens": 4, "kv_cache_tokens": 160, "dense_batch_tokens": 24, "chunk_tokens": 7}
    config = EngineConfig.resolve({"model": str(DEMO), "async_scheduling": on, **fields}, relative_to=ROOT)
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


def test_the_documentation_shows_the_step_as_it_is() -> None:
    _, _, block = (ROOT / "docs" / "architecture.md").read_text().partition("```python\n")
    shown, _, _ = block.partition("```")
    lines = textwrap.dedent(inspect.getsource(Engine.step)).splitlines(keepends=True)
    first, *_, last = (number for number, line in enumerate(lines) if '"""' in line)
    assert shown == "".join(lines[:first] + lines[last + 1 :])
