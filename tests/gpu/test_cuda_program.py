"""CudaProgram against CpuProgram launch by launch, and against transformers, on tiny models of every architecture."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from msgspec.structs import replace
from nanoflow_kernels import device, pdl, reference
from support.comparison import assert_close, relative_rms
from support.models.batches import Requests, decode_kv_tokens, forward
from support.models.cases import BATCHES, LENGTHS, TOKENS, Case
from support.schedule.schedules import plans, random_schedule
from torch import Tensor
from triton.language.extra.cuda import smid

from benchmarks.models import checkpoints
from nanoflow_backend.config.precision import Precision
from nanoflow_backend.graph.operation import Resource
from nanoflow_backend.kvcache.kv_pages import KvPages
from nanoflow_backend.runtime.binding import Binding, Kernels
from nanoflow_backend.runtime.collectives.one_rank import OneRank
from nanoflow_backend.runtime.cuda import ON_GPU, CudaProgram
from nanoflow_backend.runtime.green_contexts import lane_streams
from nanoflow_backend.schedule.plan import Schedule, ScheduleError
from nanoflow_backend.schedule.presets import nano_batched, overlapped, sequential

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SMS = torch.cuda.get_device_properties().multi_processor_count if torch.cuda.is_available() else 0
PAGE_TOKENS = (4, 64)  # 64: pages that are copied as tiles
LAUNCH_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2}
LOGITS_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}


@pytest.fixture(scope="module", params=checkpoints.OWN_GRAPHS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp(request.param), request.param, LENGTHS, num_hidden_layers=3)


def cast(weights: dict[str, Tensor], dtype: torch.dtype, where: str) -> dict[str, Tensor]:
    return {name: w.to(where, torch.float32 if name.endswith("frequencies") else dtype) for name, w in weights.items()}


def precision_of(dtype: torch.dtype) -> Precision:
    return Precision.of(str(dtype).removeprefix("torch."))  # type: ignore[arg-type]


def program(
    case: Case,
    schedules: Sequence[Schedule],
    requests: Requests,
    dtype: torch.dtype,
    *,
    max_rows: int | None = None,
    cuda_graphs: bool = True,
    kernels: Kernels = device,
    **options: Any,
) -> CudaProgram:
    pages = KvPages.allocate(
        case.config, requests.num_pages, requests.page_tokens, dtype, device="cuda", poison=True
    )  # fmt: skip
    tokens = schedules[-1].tokens
    binding = Binding(
        case.model,
        schedules,
        cast(case.weights, dtype, "cuda"),
        pages,
        OneRank(),
        kernels,
        **{"max_tokens": tokens, "precision": precision_of(dtype), **ON_GPU} | options,
    )
    return CudaProgram(binding, max_rows=max_rows or tokens, cuda_graphs=cuda_graphs)


@pytest.mark.parametrize("dtype", LAUNCH_TOLERANCE, ids=str)
@pytest.mark.parametrize("page_tokens", PAGE_TOKENS)
def test_every_launch_writes_what_the_cpus_writes(case: Case, page_tokens: int, dtype: torch.dtype) -> None:
    """What differs is copied over after each launch: the next one starts from the same."""
    requests = Requests(case.config, LENGTHS, page_tokens)
    schedule = nano_batched(case.model.layer, TOKENS, 3)
    options = {"max_tokens": TOKENS, "precision": precision_of(dtype)}
    pages = KvPages.allocate(case.config, requests.num_pages, page_tokens, dtype, poison=True)
    cpu = Binding(
        case.model, [schedule], cast(case.weights, dtype, "cpu"), pages, OneRank(), reference, **options
    )  # fmt: skip
    cuda = program(case, [schedule], requests, dtype).binding
    compared = 0
    for batch in BATCHES:
        token_ids, positions, slots, page_table = requests.inputs(batch)
        tokens = len(token_ids)
        cpu.page_table, cuda.page_table = page_table, page_table.cuda()
        for binding in (cpu, cuda):
            binding.positions[:tokens], binding.slots[:tokens] = positions, slots
        fitted = [binding.plan_for(tokens, decode_kv_tokens=0) for binding in (cpu, cuda)]
        steps = [
            *zip(cpu.embed(fitted[0], token_ids), cuda.embed(fitted[1], token_ids.cuda()), strict=True),
            *zip(cpu.layers(fitted[0]), cuda.layers(fitted[1]), strict=True),
        ]
        for ours, theirs in steps:
            if ours:
                ours.run()
            if not ours or not theirs:
                assert not theirs, "only the CPU copies what one rank has to itself"
                continue
            theirs.run()
            for expected, actual in zip(ours.rows, theirs.rows, strict=True):
                if expected.is_floating_point():
                    assert_close(ours.where, actual.cpu(), expected, LAUNCH_TOLERANCE[dtype])
                else:
                    assert actual.tolist() == expected.tolist(), ours.where
                actual.copy_(expected)
                compared += 1
            found, correct = cuda.kv.tensor, cpu.kv.tensor
            assert torch.equal(found.isnan().cpu(), correct.isnan()), f"{ours.where} writes other places of pages"
            assert_close(f"pages after {ours.where}", found.cpu().nan_to_num(), correct.nan_to_num(), 1e-2)
            found.copy_(correct)
    assert compared > 300
    assert any(op.resource is Resource.NETWORK for op in cpu.plans[0].layers[0].operations)


@pytest.mark.parametrize("dtype", LOGITS_TOLERANCE, ids=str)
@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_logits_are_those_of_transformers(case: Case, cuda_graphs: bool, dtype: torch.dtype) -> None:
    """Every plan in lanes of its own; each batch is padded, and runs once as it comes and again from the capture."""
    requests = Requests(case.config, LENGTHS, 64)
    for name, schedule in plans(case.model.layer, 4 * TOKENS).items():
        made = program(case, [schedule], requests, dtype, cuda_graphs=cuda_graphs)
        page_table = requests.page_table.cuda()
        for _ in range(2):
            for batch in BATCHES:
                token_ids, positions, slots, _ = (x.cuda() for x in requests.inputs(batch))
                forward(made, (token_ids, positions, slots, page_table))
                logits = made.head(torch.arange(len(token_ids), dtype=torch.int32, device="cuda")).cpu()
                expected = requests.rows(case.logits, batch)
                assert logits.isfinite().all()
                # The median row: in a router's near tie, rounding may choose other experts.
                errors = sorted(relative_rms(a, b) for a, b in zip(logits, expected, strict=True))
                assert errors[len(errors) // 2] < LOGITS_TOLERANCE[dtype], f"{name}, {batch}: {errors}"


def test_kernels_that_start_early_give_the_same_bits(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replayed back to back, so that one step's first kernels come right behind the last ones of the step before."""
    requests, results = Requests(case.config, LENGTHS, 64), []
    for rows in (0, pdl.MAX_PDL_ROWS):
        monkeypatch.setattr(pdl, "MAX_PDL_ROWS", rows)
        made = program(case, [sequential(case.model.layer, TOKENS)], requests, torch.bfloat16)
        page_table, logits = requests.page_table.cuda(), []
        inputs = [[x.cuda() for x in requests.inputs(batch)[:3]] for batch in BATCHES]
        for _ in range(50):
            for token_ids, positions, slots in inputs:
                forward(made, (token_ids, positions, slots, page_table))
                logits.append(made.head(torch.arange(len(token_ids), dtype=torch.int32, device="cuda")).clone())
        results.append((torch.cat(logits), made.binding.kv.tensor.nan_to_num()))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_each_bucket_runs_under_the_plan_for_its_size(case: Case, cuda_graphs: bool) -> None:
    """Buckets of 16, 32, 48 and 64 tokens in turn, the plans random but the first, on buffers that they share."""
    requests, graph, rng = Requests(case.config, [61, 61], 64), case.model.layer, random.Random(4)
    batches = [[(0, 0, 9)], [(0, 9, 29)], [(0, 29, 60), (1, 0, 9)], [(1, 9, 60), (0, 60, 61)], [(1, 60, 61)]]
    page_table = requests.page_table.cuda()

    def logits(*schedules: Schedule) -> list[Tensor]:
        made, found = program(case, schedules, requests, torch.float32, cuda_graphs=cuda_graphs), []
        for batch in batches * 2:  # as it comes, and from the capture
            token_ids, positions, slots, _ = (x.cuda() for x in requests.inputs(batch))
            forward(made, (token_ids, positions, slots, page_table))
            found.append(made.head(torch.arange(len(token_ids), dtype=torch.int32, device="cuda")).cpu())
        return found

    expected = logits(sequential(graph, 64))
    for _ in range(3):
        found = logits(sequential(graph, 16), random_schedule(graph, 40, rng), random_schedule(graph, 64, rng))
        for batch, ours, theirs in zip(batches * 2, found, expected, strict=True):
            assert_close(f"logits of {batch}", ours, theirs, 1e-4)


@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_plans_of_one_size_change_from_step_to_step(case: Case, cuda_graphs: bool) -> None:
    """Halves while decodes read much, sequential else: warmed up, so that every batch replays a capture."""
    requests, layer = Requests(case.config, LENGTHS, 64), case.model.layer
    halves = replace(overlapped(layer, TOKENS, 8, 0.5, 40, SMS), least_decode_kv_tokens=18)
    reads = [decode_kv_tokens(batch) for batch in BATCHES]
    assert [least >= 18 for least in reads] == [False, True, False, True]
    page_table, logits = requests.page_table.cuda(), []
    for schedules in ([halves, sequential(layer, TOKENS)], [sequential(layer, TOKENS)]):
        made = program(case, schedules, requests, torch.float32, cuda_graphs=cuda_graphs)
        made.warm_up(page_table)
        found = []
        for batch, kv_tokens in zip(BATCHES, reads, strict=True):
            token_ids, positions, slots, _ = (x.cuda() for x in requests.inputs(batch))
            forward(made, (token_ids, positions, slots, page_table), kv_tokens)
            found.append(made.head(torch.arange(len(token_ids), dtype=torch.int32, device="cuda")).clone())
        logits.append(torch.cat(found))
    assert_close("logits", logits[0].cpu(), logits[1].cpu(), 1e-5)


def test_capped_launches_give_the_same_logits(case: Case) -> None:
    requests, batch = Requests(case.config, LENGTHS, 64), BATCHES[0]
    schedule = nano_batched(case.model.layer, TOKENS, 3)
    capped = replace(schedule, launches=tuple(replace(x, sms=20) for x in schedule.launches))
    token_ids, positions, slots, page_table = (x.cuda() for x in requests.inputs(batch))
    rows, logits = torch.arange(len(token_ids), device="cuda"), []
    for plan in (schedule, capped):
        made = program(case, [plan], requests, torch.float32)
        forward(made, (token_ids, positions, slots, page_table))
        logits.append(made.head(rows).clone())
    assert_close("logits under a cap", logits[1].cpu(), logits[0].cpu(), 1e-5)


@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_halves_on_sms_of_their_own_give_the_same_logits_and_pages(case: Case, cuda_graphs: bool) -> None:
    """Run as they come, and again from the capture."""
    requests, layer, tokens = Requests(case.config, LENGTHS, 64), case.model.layer, 4 * TOKENS
    results = []
    for schedule in (sequential(layer, tokens), overlapped(layer, tokens, tokens // 2, 0.5, 40, SMS)):
        made = program(case, [schedule], requests, torch.float32, cuda_graphs=cuda_graphs)
        page_table, logits = requests.page_table.cuda(), []
        for batch in BATCHES * 3:
            token_ids, positions, slots, _ = (x.cuda() for x in requests.inputs(batch))
            forward(made, (token_ids, positions, slots, page_table))
            logits.append(made.head(torch.arange(len(token_ids), dtype=torch.int32, device="cuda")).clone())
        results.append((torch.cat(logits), made.binding.kv.tensor))
    (logits, pages), (expected, expected_pages) = results
    assert_close("logits", logits.cpu(), expected.cpu(), 1e-5)
    assert torch.equal(pages.isnan(), expected_pages.isnan())
    assert_close("pages", pages.cpu().nan_to_num(), expected_pages.cpu().nan_to_num(), 1e-5)


@triton.jit
def _where(out):
    tl.store(out + tl.program_id(0), smid())


def test_streams_of_lanes_keep_to_sms_of_their_own() -> None:
    shares = (("memory", 40), ("network", 8), ("compute", SMS - 48))
    used: dict[str, set[int]] = {}
    for lane, stream in lane_streams(shares).items():
        found = torch.full((64 * SMS,), -1, dtype=torch.int32, device="cuda")
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            _where[(len(found),)](found)
        torch.cuda.synchronize()
        used[lane] = set(found.tolist())
    assert {lane: len(sms) for lane, sms in used.items()} == dict(shares)
    assert len(set().union(*used.values())) == SMS


def test_sms_that_the_device_does_not_grant_are_refused(tmp_path: Path) -> None:
    case = Case(tmp_path, "llama", LENGTHS, num_hidden_layers=1)
    uneven = overlapped(case.model.layer, TOKENS, 8, 0.5, 33, SMS)
    with pytest.raises(ScheduleError, match="partition: lane 'compute' has 99 SMs, the device would grant 100"):
        program(case, [uneven], Requests(case.config, LENGTHS, 64), torch.float32)


def test_too_much_is_refused(tmp_path: Path) -> None:
    case = Case(tmp_path, "llama", LENGTHS, num_hidden_layers=1)
    made = program(case, [sequential(case.model.layer, TOKENS)], Requests(case.config, LENGTHS, 64), torch.float32)
    ints = torch.zeros(TOKENS + 1, dtype=torch.int32, device="cuda")
    with pytest.raises(ValueError, match="tokens: expected at most 16, got 17"):
        forward(made, (ints, ints, ints, ints[:, None]))
    with pytest.raises(ValueError, match="rows: expected at most 16, got 17"):
        made.head(ints)
