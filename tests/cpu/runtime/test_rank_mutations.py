"""A schedule of several ranks without one of its waits must be caught, in every form of the all-reduces."""

import pytest
from msgspec.structs import replace
from support.models.shapes import config
from support.runtime.dry_program import NoNetwork, dry_program, mutants, overtaken, refuses, run
from support.runtime.tensor_parallel_rank import FORMS
from support.schedule.schedules import without_wait

from nanoflow_backend.graph.collectives import model_in_forms, with_parameters
from nanoflow_backend.models.model import build
from nanoflow_backend.schedule.order import PartialOrder
from nanoflow_backend.schedule.plan import ScheduleError
from nanoflow_backend.schedule.presets import alternating, nano_batched
from nanoflow_backend.schedule.validate import validate


@pytest.mark.parametrize("form", FORMS)
def test_without_a_wait_plans_of_several_ranks_fail_too(form: str) -> None:
    """In every form of the all-reduces, with collectives in a lane of their own."""
    model, forms = build(config("llama"), 2), FORMS[form]
    held, graph = with_parameters(model, [{}, forms], 2), model_in_forms(model, forms, 2).layer
    plans = (nano_batched(graph, 8, 2), alternating(graph, 8, 4, 0.5, {"network": 8, "compute": 124}))
    killed = 0
    for plan in (replace(plan, all_reduces=dict(forms)) for plan in plans):
        validate(plan, graph, 3, ranks=2)
        program = dry_program(held, plan, NoNetwork())
        run(program, list(range(len(PartialOrder(plan, 3).steps))))
        for number, wait in mutants(plan):
            mutant = without_wait(plan, number, wait)
            with pytest.raises(ScheduleError, match=r"may start before|in either order"):
                validate(mutant, graph, 3, ranks=2)
            order, program = PartialOrder(mutant, 3), dry_program(held, mutant, NoNetwork())
            assert any(refuses(program, late) for late in overtaken(order, wait, number)), (number, wait)
            killed += 1
    assert killed > 10, killed
