"""Greedy tokens do not depend on the schedule: plans that a search finds, random ones, and several in one file."""

import random
from itertools import pairwise
from pathlib import Path

import pytest
from support.models.cases import LENGTHS, TOKENS, Case
from support.schedule.schedules import random_schedule
from support.schedule.searched import schedule_file, searched
from torch import Tensor

from nanoflow_backend.engine import LLM, Engine, SamplingParams
from nanoflow_backend.runtime.binding import FittedPlan
from nanoflow_backend.runtime.device import find_device
from nanoflow_backend.schedule.plan import Schedule
from nanoflow_backend.schedule.validate import validate

ARCHITECTURES = ("llama", "qwen2", "mixtral")  # schedules of others have launches like these


@pytest.fixture(scope="module", params=ARCHITECTURES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp(request.param), request.param, LENGTHS, num_hidden_layers=3)


@pytest.fixture(scope="module")
def found(case: Case) -> list[Schedule]:
    """The plans of its layer, best first; it takes a solver seconds to find them."""
    return searched(case.model, TOKENS)


def test_every_schedule_file_gives_the_tokens_of_sequential(case: Case, found: list[Schedule], tmp_path: Path) -> None:
    """Steps of all sizes: prompts fill some, decodes alone are others; and those of one size change plans."""
    folder, model, rng = case.folder, case.model, random.Random(6)
    prompts = [[rng.randrange(331) for _ in range(rng.randint(1, 40))] for _ in range(12)]
    options = {"page_tokens": 4, "max_running": 5, "kv_cache_tokens": 2048, "device": "cpu"}
    greedy = [SamplingParams(max_tokens=rng.randint(1, 24), temperature=0.0) for _ in prompts]
    expected = LLM.from_pretrained(folder, dense_batch_tokens=TOKENS, **options).generate(prompts, greedy)
    plans = [found[0], found[-1], *(random_schedule(model.layer, TOKENS, rng) for _ in range(3))]
    for seed, plan in enumerate(plans):
        path = schedule_file(tmp_path / f"{seed}.json", model, find_device("cpu"), TOKENS, plan, seed)
        llm = LLM.from_pretrained(folder, schedule=str(path), **options)
        ran = recorded(llm.engine)
        assert llm.engine.config.dense_batch_tokens == TOKENS, "the file's"
        assert [c.token_ids for c in llm.generate(prompts, greedy)] == [c.token_ids for c in expected]
        large = [schedule.least_decode_kv_tokens for schedule in ran if schedule.tokens == TOKENS]
        assert sum(a != b for a, b in pairwise(large)) >= 3, "back and forth"


def recorded(engine: Engine) -> list[Schedule]:
    """The schedule of each step that the engine will make."""
    ran: list[Schedule] = []
    program = engine.executor.worker.program
    forward = program.forward

    def recording(plan: FittedPlan, *inputs: Tensor) -> None:
        ran.append(plan.bound.schedule)
        forward(plan, *inputs)

    program.forward = recording  # type: ignore[method-assign]
    return ran


def test_plans_that_a_search_finds_give_the_logits_of_transformers(case: Case, found: list[Schedule]) -> None:
    cut = [plan for plan in found if len(plan.launches) > len(case.model.layer.operations)]
    assert len({plan.launches for plan in cut}) >= 3
    assert any(len(plan.lanes) > 1 for plan in cut)
    for plan in cut[:8]:
        validate(plan, case.model.layer, 3)
        case.check(case.program(plan))
