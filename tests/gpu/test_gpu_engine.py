"""The engine on a GPU: the same tokens as on the CPU and as transformers, whatever runs ahead; and its memory."""

import gc
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from support.places import DEMO_MODEL
from support.schedule.schedules import random_schedule, save
from support.schedule.searched import schedule_file, searched

from benchmarks.models import checkpoints
from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.config.precision import BFLOAT16, FLOAT32, Precision
from nanoflow_backend.engine import LLM, SamplingParams
from nanoflow_backend.engine.memory import GIB
from nanoflow_backend.kvcache.kv_pages import page_bytes
from nanoflow_backend.models.hugging_face import read_model_config
from nanoflow_backend.models.model import build
from nanoflow_backend.request.request import Request
from nanoflow_backend.runtime.device import find_device
from nanoflow_backend.schedule.presets import overlapped

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
PROMPTS = ("Return a list of", "The with statement", "This module provides", "Raise an exception if")
GREEDY = SamplingParams(max_tokens=64, temperature=0.0, ignore_eos=True)


def llm(**options: Any) -> LLM:
    return LLM.from_pretrained(
        DEMO_MODEL, **{"device": "cuda", "dense_batch_tokens": 256, "kv_cache_tokens": 65536} | options
    )


def token_ids(made: LLM, prompts: list[Any], params: Any) -> list[list[int]]:
    ids = [completion.token_ids for completion in made.generate(prompts, params)]
    made.engine.scheduler.check()
    assert made.engine.scheduler.stats.used_pages == 0
    return ids


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = random.Random(5)
    return [[rng.randrange(256) for _ in range(rng.randint(1, 90))] for _ in range(24)]


def save_halves(path: Path, precision: Precision) -> str:
    """A plan of two halves: decodes dealt out, attention on SMs of its own."""
    model, device = build(read_model_config(DEMO_MODEL)), find_device("cuda")
    assert device.sms is not None
    plan = overlapped(model.layer, 256, 128, 0.6, 40, device.sms)
    return save(path, model, plan, device.name, device.sms, precision)


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_halves(tmp_path_factory.mktemp("plans") / "halves.json", BFLOAT16)


@pytest.fixture(scope="module")
def exact_halves(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_halves(tmp_path_factory.mktemp("plans") / "exact_halves.json", FLOAT32)


def test_greedy_tokens_are_those_of_the_cpu(exact_halves: str) -> None:
    expected = token_ids(llm(device="cpu"), list(PROMPTS), GREEDY)
    for schedule in ("sequential", "nano-batched-3", exact_halves):
        assert token_ids(llm(dtype="float32", schedule=schedule), list(PROMPTS), GREEDY) == expected


@pytest.mark.parametrize("architecture", checkpoints.OWN_GRAPHS)
def test_greedy_tokens_are_those_of_sequential_under_every_schedule_file(architecture: str, tmp_path: Path) -> None:
    """Plans that a search finds, and random ones; buckets of 16, 32 and more tokens have plans of their own."""
    folder = checkpoints.save(checkpoints.make(architecture), tmp_path / "model")
    model, rng = build(read_model_config(folder)), random.Random(6)
    prompts = [[rng.randrange(331) for _ in range(rng.randint(1, 90))] for _ in range(12)]
    params = SamplingParams(max_tokens=24, temperature=0.0)
    options = {"kv_cache_tokens": 16384, "device": "cuda", "dtype": "float32"}
    expected = token_ids(LLM.from_pretrained(folder, dense_batch_tokens=64, **options), prompts, params)
    found = searched(model, 64)
    for seed, plan in enumerate([found[0], found[-1], *(random_schedule(model.layer, 64, rng) for _ in range(3))]):
        path = schedule_file(tmp_path / f"{seed}.json", model, find_device("cuda"), 64, plan, seed)
        made = LLM.from_pretrained(folder, schedule=str(path), **options)
        assert made.engine.config.dense_batch_tokens == 64, "the file's"
        assert token_ids(made, prompts, params) == expected


def test_greedy_tokens_are_those_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32).cuda().eval()
    made = llm(dtype="float32")
    ours = token_ids(made, list(PROMPTS), SamplingParams(max_tokens=64, min_tokens=64, temperature=0.0))
    for prompt, tokens in zip(PROMPTS, ours, strict=True):
        ids = torch.tensor([made.tokenizer.encode(prompt)], device="cuda")
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, min_new_tokens=64, do_sample=False
        )
        assert out[0, ids.shape[1] :].tolist() == tokens


@pytest.mark.parametrize("schedule", ["sequential", "nano-batched-3"])
def test_graphs_and_what_runs_ahead_change_no_token(prompts: list[list[int]], schedule: str) -> None:
    """Greedy and drawn requests side by side, prompts in chunks, batches of many sizes."""
    params = [
        SamplingParams(max_tokens=20 + n, temperature=n % 3 / 2, seed=n, top_k=n % 5 * 10, ignore_eos=True)
        for n in range(len(prompts))
    ]
    arms = [
        token_ids(llm(schedule=schedule, chunk_tokens=32, **arm), prompts, params)
        for arm in ({}, {"cuda_graphs": False}, {"async_scheduling": False})
    ]
    assert arms[0] == arms[1] == arms[2]


WAYS: list[dict[str, Any]] = [
    {"repetition_penalty": 1.5, "min_p": 0.02},
    {"presence_penalty": 1.5, "frequency_penalty": -0.5},
    {"structured_outputs": {"regex": "[0-9]{2}(-[0-9]{2}){1,9}"}, "repetition_penalty": 1.2},
    {"bad_words_token_ids": [[5], [7, 9]], "logit_bias": {"11": 3, "12": -100}, "min_tokens": 30},
    {"n": 3, "frequency_penalty": 1, "top_k": 40},
    {"prompt_logprobs": 2, "allowed_token_ids": list(range(30, 90))},
]


def in_turns(count: int, **fields: Any) -> list[SamplingParams]:
    return [SamplingParams.parse({"max_tokens": 40, "seed": k, **WAYS[k % len(WAYS)], **fields}) for k in range(count)]


def test_what_is_asked_of_sampling_is_the_same_however_it_runs(prompts: list[list[int]], exact_halves: str) -> None:
    params = in_turns(len(prompts))
    arms = [
        token_ids(llm(dtype="float32", **arm), prompts, params)
        for arm in (
            {},
            {"async_scheduling": False},
            {"schedule": "nano-batched-3", "chunk_tokens": 32},
            {"schedule": exact_halves, "chunk_tokens": 32},
        )
    ]
    assert arms[0] == arms[1] == arms[2] == arms[3]
    greedy = in_turns(len(prompts), temperature=0, n=1)
    assert token_ids(llm(dtype="float32"), prompts, greedy) == token_ids(llm(device="cpu"), prompts, greedy)


def test_prompt_logprobs_are_those_of_the_cpu(prompts: list[list[int]]) -> None:
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
    found, expected = (llm(**on).generate(prompts, params) for on in ({"dtype": "float32"}, {"device": "cpu"}))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.prompt_logprobs is not None
        assert theirs.prompt_logprobs is not None
        for a, b in zip(ours.prompt_logprobs, theirs.prompt_logprobs, strict=True):
            assert a.token_ids == b.token_ids
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-3)


def test_logprobs_come_with_their_tokens(prompts: list[list[int]]) -> None:
    params = SamplingParams(max_tokens=8, temperature=0.0, logprobs=2, ignore_eos=True)
    for completion in llm(dtype="float32").generate(prompts, params):
        for token, found in zip(completion.token_ids, completion.logprobs, strict=True):
            assert found.token_ids[:2] == [token, token]
            assert found.sampled_rank == 1


@pytest.mark.parametrize("overlaps", [False, True])
def test_nothing_but_collect_waits_for_the_device(prompts: list[list[int]], halves: str, overlaps: bool) -> None:
    made, rounds = llm(schedule=halves if overlaps else "sequential").engine, 2
    for attempt in range(rounds):  # in the first round buckets are captured, which waits
        torch.cuda.set_sync_debug_mode("error" if attempt == rounds - 1 else "default")
        try:
            for number, prompt in enumerate(prompts):
                params = SamplingParams(max_tokens=24, temperature=number % 2, seed=number, ignore_eos=True)
                made.add(Request(number, prompt, params))
            for number, params in enumerate(in_turns(12), start=len(prompts)):
                made.add(Request(number, prompts[0], params))
            while made.has_work:
                made.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_cache_tokens": 10**9}, r"kv_cache_tokens: 10+ tokens take .* GiB .* are free on NVIDIA .* at most \d+"),
        ({"kv_cache_tokens": None, "gpu_memory_utilization": 1e-6}, "gpu_memory_utilization: .* leave no room for KV"),
    ],
)
def test_pages_that_do_not_fit_are_refused_with_numbers(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        llm(**options)


def test_pages_fill_the_share_of_memory_that_is_ours() -> None:
    gc.collect()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    if (elsewhere := total - free - torch.cuda.memory_reserved()) > 2 * GIB:  # more than this process' own context
        pytest.skip(f"others use {elsewhere / GIB:.1f} GiB of the GPU, and how much changes: run it alone")
    share = 1 - free / total + 0.05  # what is in use, and 5 % more
    made = llm(kv_cache_tokens=None, gpu_memory_utilization=share, dense_batch_tokens=64).engine
    bytes_a_page = page_bytes(made.model_config, made.config.page_tokens, torch.bfloat16)
    kv_share = made.executor.num_pages * bytes_a_page / total
    assert 0.03 < kv_share < 0.05
    free, total = torch.cuda.mem_get_info()
    assert share - 0.01 < 1 - free / total < share + 0.005
