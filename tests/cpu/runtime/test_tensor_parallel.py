"""Two and four ranks over gloo compute what one does, in every form of the all-reduces."""

import random

import pytest
import torch
import torch.multiprocessing
from nanoflow_kernels import reference
from support.collectives.in_process import run_ranks
from support.comparison import assert_close
from support.models.batches import Requests, forward
from support.models.cases import BATCHES, LENGTHS, TOKENS, Case
from support.models.fp8_checkpoints import FOLDER
from support.runtime import tensor_parallel_rank
from support.runtime.tensor_parallel_rank import FORMS, Work
from support.schedule.schedules import random_interleaving
from torch import Tensor

from benchmarks.models.checkpoints import CONFIGS
from nanoflow_backend.config.precision import FLOAT32
from nanoflow_backend.graph.collectives import with_parameters
from nanoflow_backend.models.hugging_face import read_model_config
from nanoflow_backend.models.model import build
from nanoflow_backend.models.weights import load
from nanoflow_backend.runtime.binding import Binding
from nanoflow_backend.runtime.collectives.one_rank import OneRank
from nanoflow_backend.runtime.collectives.protocol import Collectives
from nanoflow_backend.runtime.cpu import CpuProgram
from nanoflow_backend.schedule.order import PartialOrder
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
IN_FP8 = {
    "ct_tensor_static_kv": ["gathered and split", "normed"],
    "modelopt_experts": ["split", "normed"],
    "fp8_block": ["split", "normed"],  # ranks would cut the blocks of O by its rows
}
# By ranks and model, the forms to run: all where heads are few or an MLP is another one, else two that are unlike.
AT = {
    2: {name: list(FORMS) if name in ("llama", "mixtral") else ["gathered and split", "normed"] for name in MODELS},
    4: {"llama": ["gathered and split", "normed"]},
}
RUNS = [
    (ranks, name, schedule)
    for ranks, models in AT.items()
    for name, forms in models.items()
    for schedule in ("sequential", *forms)
]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return {
        name: Case(folder / name, name if name in CONFIGS else "llama", LENGTHS, **fields)
        for name, fields in MODELS.items()
    }


Results = dict[tuple[int, str, str], Tensor]  # by ranks, checkpoint and schedule: the logits of all batches


@pytest.fixture(scope="module")
def results(cases: dict[str, Case], tmp_path_factory: pytest.TempPathFactory) -> Results:
    found: Results = {}
    torch.multiprocessing.get_context("forkserver").set_forkserver_preload([tensor_parallel_rank.__name__])
    for ranks, checkpoints in (
        (2, {cases[name].folder: AT[2][name] for name in MODELS} | {FOLDER / name: IN_FP8[name] for name in IN_FP8}),
        (4, {cases[name].folder: forms for name, forms in AT[4].items()}),
    ):
        folder = tmp_path_factory.mktemp("ranks")
        work = Work(checkpoints, LENGTHS, BATCHES, TOKENS, ranks, folder / "rendezvous", folder / "results")
        # Ranks are forked from one process that has imported torch: six times that would be most of the time.
        torch.multiprocessing.start_processes(
            tensor_parallel_rank.run, (work,), nprocs=ranks, start_method="forkserver"
        )
        found |= {(ranks, *key): logits for key, logits in torch.load(work.results).items()}
    return found


def batch_by_batch(program: CpuProgram, requests: Requests) -> Tensor:
    """The logits of all rows of all batches."""
    logits = []
    for batch in BATCHES:
        forward(program, requests.inputs(batch))
        logits.append(program.head(torch.arange(program.plan.tokens)))
    return torch.cat(logits)


@pytest.mark.parametrize(("ranks", "name", "schedule"), RUNS)
def test_ranks_give_the_logits_of_one(
    cases: dict[str, Case], results: Results, ranks: int, name: str, schedule: str
) -> None:
    case = cases[name]
    alone = batch_by_batch(case.program(sequential(case.model.layer, TOKENS)), case.requests)
    assert_close(f"logits of {ranks} ranks", results[ranks, name, schedule], alone, 1e-5)
    transformers = torch.cat([case.requests.rows(case.logits, batch) for batch in BATCHES])
    assert_close(f"logits of {ranks} ranks", results[ranks, name, schedule], transformers, 1e-4)


@pytest.mark.parametrize(
    ("name", "schedule"), [(name, form) for name in IN_FP8 for form in ("sequential", *IN_FP8[name])]
)
def test_two_ranks_give_the_logits_of_one_in_fp8(results: Results, name: str, schedule: str) -> None:
    config = read_model_config(FOLDER / name)
    model, requests = build(config), Requests(config, LENGTHS)
    weights, pages = load(FOLDER / name, config, model), requests.empty_pages()
    options = {"max_tokens": TOKENS, "precision": FLOAT32}
    binding = Binding(model, [sequential(model.layer, TOKENS)], weights, pages, OneRank(), reference, **options)
    assert_close("logits of two ranks", results[2, name, schedule], batch_by_batch(CpuProgram(binding), requests), 1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_ranks_in_interleavings_of_their_own_give_the_logits_of_one(cases: dict[str, Case], form: str) -> None:
    """Ranks run apart as far as lanes and waits let them, and meet in collectives; boundaries cut a request's chunk."""
    case, ranks = cases["one kv head"], 2
    model = build(case.config, ranks)
    schedule = tensor_parallel_rank.schedules(model, [form], TOKENS, ranks)[form]
    order = PartialOrder(schedule, model.num_layers)
    held = with_parameters(model, [schedule.all_reduces], ranks)
    logits: dict[int, Tensor] = {}

    def run(collectives: Collectives) -> None:
        rank = collectives.rank
        weights = load(case.folder, case.config, held, rank=rank, tp=ranks)
        options = {"max_tokens": TOKENS, "precision": FLOAT32}
        pages = case.requests.empty_pages(ranks)
        program = CpuProgram(Binding(model, [schedule], weights, pages, collectives, reference, **options))
        rng, found = random.Random(rank), []
        for batch in BATCHES:
            forward(program, case.requests.inputs(batch), order=random_interleaving(order, rng))
            found.append(program.head(torch.arange(program.plan.tokens)))
        logits[rank] = torch.cat(found)

    run_ranks(ranks, run)
    expected = torch.cat([case.requests.rows(case.logits, batch) for batch in BATCHES])
    for rank in range(ranks):
        assert_close(f"logits of rank {rank}", logits[rank], expected, 1e-4)
