"""Greedy tokens do not depend on the schedule: plans that a search finds, random ones, and several in one file."""

import random
from itertools import pairwise
from pathlib import Path

import pytest
from support.models.cases import LENGTHS, TOKENS, Case
from support.schedule.schedules import random_schedule
from support.schedule.searched import schedule_file, searched
from torch import Tensor

from benchmarks.models import checkpoints
from nanoflow_backend.engine import LLM, Engine, SamplingParams
from nanoflow_backend.models.hugging_face import read_model_config
from nanoflow_backend.models.model import build
from nanoflow_backend.runtime.binding import FittedPlan
from nanoflow_backend.runtime.device import find_device
from nanoflow_backend.schedule.plan import Schedule
from nanoflow_backend.schedule.validate import validate

B_DENSE = 32
ARCHITECTURES = ("llama", "qwen2", "mixtral")  # schedules of others have launches like these


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_schedule_file_gives_the_tokens_of_sequential(architecture: str, tmp_path: Path) -> None:
    """Steps of all sizes: prompts fill some, decodes alone are others; and those of one size change plans."""
    folder = checkpoints.save(checkpoints.make(architecture), tmp_path / "model")
    model, rng = build(read_model_config(folder)), random.Random(6)
    prompts = [[rng.randrange(331) for _ in range(rng.randint(1, 40))] for _ in range(30)]
    options = {"page_tokens": 4, "max_running": 10, "kv_cache_tokens": 2048, "device": "cpu"}
    greedy = [SamplingParams(max_tokens=rng.randint(1, 24), temperature=0.0) for _ in prompts]
    expected = LLM.from_pretrained(folder, dense_batch_tokens=B_DENSE, **options).generate(prompts, greedy)
    found = searched(model, B_DENSE)
    plans = [found[0], found[-1], *(random_schedule(model.layer, B_DENSE, rng) for _ in range(3))]
    for seed, plan in enumerate(plans):
        path = schedule_file(tmp_path / f"{seed}.json", model, find_device("cpu"), B_DENSE, plan, seed)
        llm = LLM.from_pretrained(folder, schedule=str(path), **options)
        ran = recorded(llm.engine)
        assert llm.engine.config.dense_batch_tokens == B_DENSE, "the file's"
        assert [c.token_ids for c in llm.generate(prompts, greedy)] == [c.token_ids for c in expected]
        large = [schedule.least_decode_kv_tokens for schedule in ran if schedule.tokens == B_DENSE]
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


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_plans_that_a_search_finds_give_the_logits_of_transformers(architecture: str, tmp_path: Path) -> None:
    case = Case(tmp_path, architecture, LENGTHS, num_hidden_layers=3)
    found = searched(case.model, TOKENS)
    cut = [plan for plan in found if len(plan.launches) > len(case.model.layer.operations)]
    assert len({plan.launches for plan in cut}) >= 3
    assert any(len(plan.lanes) > 1 for plan in cut)
    for plan in cut[:8]:
        validate(plan, case.model.layer, 3)
        case.check(case.program(plan))
