"""Two ranks over gloo compute what one does."""

import pytest
import torch
import torch.multiprocessing
from nanoflow_kernels import reference
from support.comparison import assert_close
from support.models.batches import Requests, forward
from support.models.cases import BATCHES, LENGTHS, TOKENS, Case
from support.models.fp8_checkpoints import FOLDER
from support.runtime import tensor_parallel_rank
from support.runtime.tensor_parallel_rank import Work
from torch import Tensor

from benchmarks.models.checkpoints import CONFIGS
from nanoflow_backend.config.precision import FLOAT32
from nanoflow_backend.models.hugging_face import read_model_config
from nanoflow_backend.models.model import build
from nanoflow_backend.models.weights import load
from nanoflow_backend.runtime.binding import Binding
from nanoflow_backend.runtime.collectives.one_rank import OneRank
from nanoflow_backend.runtime.cpu import CpuProgram
from nanoflow_backend.schedule.presets import sequential

# Inner widths are odd: the last rank's columns are padded. One kv head is copied to both ranks.
MODELS = {
    "llama": {},
    "qwen2": {"heads": 4, "kv_heads": 4},
    "qwen3_moe": {"num_local_experts": 4},
    "mixtral": {"num_local_experts": 4},
    "phi3": {"kv_heads": 1},
    "seed_oss": {},
    "glm": {"kv_heads": 1},
    "one kv head": {"kv_heads": 1},
}

# Their scales do not depend on what a rank holds of a row: they are static, or of blocks that no rank cuts.
IN_FP8 = ("ct_tensor_static_kv", "modelopt_experts", "fp8_block")


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
    checkpoints = [*(case.folder for case in cases.values()), *(FOLDER / name for name in IN_FP8)]
    work = Work(checkpoints, LENGTHS, BATCHES, TOKENS, 2, folder / "rendezvous", folder / "results")
    torch.multiprocessing.spawn(tensor_parallel_rank.run, (work,), nprocs=work.ranks)
    return torch.load(work.results)


def batch_by_batch(program: CpuProgram, requests: Requests) -> Tensor:
    """The logits of all rows of all batches."""
    logits = []
    for batch in BATCHES:
        forward(program, requests.inputs(batch))
        logits.append(program.head(torch.arange(program.plan.tokens)))
    return torch.cat(logits)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("schedule", ["sequential", "nano-batched", "split"])
def test_two_ranks_give_the_logits_of_one(
    cases: dict[str, Case], results: dict[tuple[str, str], Tensor], name: str, schedule: str
) -> None:
    case = cases[name]
    alone = batch_by_batch(case.program(sequential(case.model.layer, TOKENS)), case.requests)
    assert_close("logits of two ranks", results[name, schedule], alone, 1e-5)
    transformers = torch.cat([case.requests.rows(case.logits, batch) for batch in BATCHES])
    assert_close("logits of two ranks", results[name, schedule], transformers, 1e-4)


@pytest.mark.parametrize("name", IN_FP8)
@pytest.mark.parametrize("schedule", ["sequential", "nano-batched", "split"])
def test_two_ranks_give_the_logits_of_one_in_fp8(
    results: dict[tuple[str, str], Tensor], name: str, schedule: str
) -> None:
    config = read_model_config(FOLDER / name)
    model, requests = build(config), Requests(config, LENGTHS)
    weights, pages = load(FOLDER / name, config, model), requests.empty_pages()
    options = {"max_tokens": TOKENS, "precision": FLOAT32}
    binding = Binding(model, [sequential(model.layer, TOKENS)], weights, pages, OneRank(), reference, **options)
    assert_close("logits of two ranks", results[name, schedule], batch_by_batch(CpuProgram(binding), requests), 1e-4)
