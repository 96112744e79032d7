"""Two ranks over gloo compute what one does."""

import pytest
import torch
import torch.multiprocessing
from support.comparison import assert_close
from support.models.batches import forward
from support.models.cases import BATCHES, LENGTHS, TOKENS, Case
from support.runtime import tensor_parallel_rank
from support.runtime.tensor_parallel_rank import Work
from torch import Tensor

from benchmarks.models.checkpoints import CONFIGS
from nanoflow_backend.schedule.presets import sequential

# Inner widths are odd: the last rank's columns are padded. One kv head is copied to both ranks.
MODELS = {
    "llama": {},
    "qwen2": {"heads": 4, "kv_heads": 4},
    "qwen3_moe": {"num_local_experts": 4},
    "mixtral": {"num_local_experts": 4},
    "phi3": {"kv_heads": 1},
    "one kv head": {"kv_heads": 1},
}


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return {
        name: Case(folder / name, name if name in CONFIGS else "llama", LENGTHS, **fields)
        for name, fields in MODELS.items()
    }


@pytest.fixture(scope="module")
def results(cases: dict[str, Case], tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Tensor]:
    folder = tmp_path_factory.mktemp("ranks")
    work = Work(
        [case.folder for case in cases.values()], LENGTHS, BATCHES, TOKENS, 2, folder / "rendezvous", folder / "results"
    )
    torch.multiprocessing.spawn(tensor_parallel_rank.run, (work,), nprocs=work.ranks)
    return torch.load(work.results)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("schedule", ["sequential", "nano-batched", "split"])
def test_two_ranks_give_the_logits_of_one(
    cases: dict[str, Case], results: dict[tuple[str, str], Tensor], name: str, schedule: str
) -> None:
    case, alone = cases[name], []
    program = case.program(sequential(case.model.layer, TOKENS))
    for batch in BATCHES:
        forward(program, case.requests.inputs(batch))
        alone.append(program.head(torch.arange(program.plan.tokens)))
    assert_close("logits of two ranks", results[name, schedule], torch.cat(alone), 1e-5)
    transformers = torch.cat([case.requests.rows(case.logits, batch) for batch in BATCHES])
    assert_close("logits of two ranks", results[name, schedule], transformers, 1e-4)
