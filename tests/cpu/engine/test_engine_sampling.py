"""What a request asks of sampling, through the whole engine: the same tokens however it is scheduled."""

from __future__ import annotations

import json
import random
import re
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from support.runtime.tensor_parallel_rank import FORMS
from transformers import AutoModelForCausalLM

from benchmarks.models import checkpoints, tiny_tokenizers
from nanoflow_backend.bench.reservation import ReserveNothing
from nanoflow_backend.config.precision import FLOAT32
from nanoflow_backend.engine import LLM, Completion, Engine, SamplingParams
from nanoflow_backend.graph.collectives import model_in_forms
from nanoflow_backend.models.hugging_face import read_model_config
from nanoflow_backend.models.model import build
from nanoflow_backend.request.internal_error import RequestError
from nanoflow_backend.request.request import Request
from nanoflow_backend.request.sampling_params import InvalidRequest
from nanoflow_backend.schedule.file import Header, ScheduleFile, fingerprint
from nanoflow_backend.schedule.presets import nano_batched
from nanoflow_backend.scheduler.batch import Delta, FinishReason
from nanoflow_backend.text.tokenizer import Tokenizer

NUMBER = {"regex": "[0-9]{2}(-[0-9]{2}){1,9}"}
POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer"}, "tag": {"enum": ["red", "green"]}},
    "required": ["x", "tag"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_tokenizers.llama3(tmp_path_factory.mktemp("model"))
    tokenizer = Tokenizer.from_pretrained(folder)
    made = checkpoints.make("llama", vocab_size=tokenizer.vocab_size, eos_token_id=tokenizer.eos_id)
    return checkpoints.save(made, folder)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = random.Random(8)
    return [[rng.randrange(256) for _ in range(rng.randint(1, 40))] for _ in range(16)]


@pytest.fixture(scope="module")
def asked() -> list[SamplingParams]:
    """Of everything something, in turns."""
    ways: list[dict[str, Any]] = [
        {},
        {"repetition_penalty": 1.5, "min_p": 0.02},
        {"presence_penalty": 1.5, "frequency_penalty": -0.5, "temperature": 0},
        {"structured_outputs": NUMBER, "repetition_penalty": 1.2},
        {"bad_words_token_ids": [[5], [7, 9]], "logit_bias": {"11": 3, "12": -100}, "min_tokens": 30},
        {"structured_outputs": {"json": POINT}, "min_tokens": 8, "logit_bias": {"13": 2}},
        {"n": 3, "frequency_penalty": 1, "top_k": 40},
        {"prompt_logprobs": 2, "logprobs": 1, "allowed_token_ids": list(range(30, 90))},
    ]
    return [SamplingParams.parse({"max_tokens": 32, "seed": k, **ways[k % len(ways)]}) for k in range(16)]


@pytest.fixture(scope="module")
def expected(model: Path, prompts: list[list[int]], asked: list[SamplingParams]) -> list[Completion]:
    return LLM.from_pretrained(model).generate(prompts, asked)


def schedule_in_forms(model: Path, path: Path) -> str:
    """The file with plans for two ranks, whose all-reduces have another form for each size of batch."""
    made, plans = build(read_model_config(model), 2), []
    for tokens, form in ((16, "whole"), (32, "gathered and split"), (64, "normed")):
        graph = model_in_forms(made, FORMS[form], 2).layer
        plans.append(replace(nano_batched(graph, tokens, 2), all_reduces=dict(FORMS[form])))
    header = Header(
        model_fingerprint=fingerprint(*made.layers),
        precision=FLOAT32,
        device="cpu",
        tensor_parallel=2,
        dense_batch_tokens=64,
    )
    ScheduleFile(header=header, plans=tuple(plans)).save(path)
    return str(path)


def comparable(completions: list[Completion]) -> list[Any]:
    prompt_ranks = [[entry.sampled_rank for entry in c.prompt_logprobs or ()] for c in completions]
    return [(c.token_ids, c.text, c.finish_reason, ranks) for c, ranks in zip(completions, prompt_ranks, strict=True)]


@pytest.mark.parametrize(
    "settings",
    [
        {"async_scheduling": False},
        {"prefix_caching": False, "chunk_tokens": 5},
        {"schedule": "nano-batched-2", "dense_batch_tokens": 48, "page_tokens": 8},
        {"max_running": 3},
        {"tensor_parallel": 2, "schedule": "forms.json"},
    ],
    ids=str,
)
def test_scheduling_changes_no_token(
    model: Path,
    prompts: list[list[int]],
    asked: list[SamplingParams],
    expected: list[Completion],
    settings: dict[str, Any],
    tmp_path: Path,
) -> None:
    if "tensor_parallel" in settings:
        settings = settings | {"schedule": schedule_in_forms(model, tmp_path / settings["schedule"])}
    llm = LLM.from_pretrained(model, **settings)
    found = llm.generate(prompts, asked)
    llm.close()
    assert comparable(found) == comparable(expected)


def test_preemption_changes_no_token(
    model: Path, prompts: list[list[int]], asked: list[SamplingParams], expected: list[Completion]
) -> None:
    """What was counted and where a grammar was is made again from the tokens."""
    scarce = LLM.from_pretrained(model, kv_cache_tokens=128, page_tokens=4, dense_batch_tokens=32)
    scarce.engine.scheduler._planner._forecast = ReserveNothing()  # it admits too many
    assert comparable(scarce.generate(prompts, asked)) == comparable(expected)
    assert scarce.engine.scheduler.stats.preemptions >= 10
    scarce.engine.scheduler.check()


def test_outputs_have_their_form(expected: list[Completion], asked: list[SamplingParams], prompts: Any) -> None:
    by_request, ended = iter(expected), 0
    for params in asked:
        completions = [next(by_request) for _ in range(params.n)]
        assert [c.index for c in completions] == list(range(params.n))
        for c in completions:
            outputs = params.structured_outputs
            ended += outputs is not None and c.finish_reason is FinishReason.STOP
            if outputs and outputs.regex and c.finish_reason is FinishReason.STOP:
                assert re.fullmatch(outputs.regex, c.text)
            elif outputs and outputs.json and c.finish_reason is FinishReason.STOP:
                assert json.loads(c.text)["tag"] in ("red", "green")
            for word in params.bad_words_token_ids:
                assert list(word) not in [c.token_ids[k : k + len(word)] for k in range(len(c.token_ids))]
            if params.allowed_token_ids:
                assert set(c.token_ids) <= set(params.allowed_token_ids)
        if params.n > 1:
            assert len({tuple(c.token_ids) for c in completions}) == params.n
    assert ended >= 2, "hardly an output came to the end of its form"


def test_greedy_penalties_are_those_of_transformers(model: Path, prompts: list[list[int]]) -> None:
    reference = AutoModelForCausalLM.from_pretrained(model)
    ways: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"repetition_penalty": 1.7}, {"repetition_penalty": 1.7}),
        ({"repetition_penalty": 0.8, "min_tokens": 24}, {"repetition_penalty": 0.8, "min_new_tokens": 24}),
        ({"logit_bias": {"3": 2.5, "4": -50.0}}, {"sequence_bias": [[[3], 2.5], [[4], -50.0]]}),
    ]
    params = [SamplingParams.parse({"max_tokens": 24, "temperature": 0, **ways[k % 3][0]}) for k in range(len(prompts))]
    found = LLM.from_pretrained(model).generate(prompts, params)
    for number, (prompt, completion) in enumerate(zip(prompts, found, strict=True)):
        ids = torch.tensor([prompt])
        output = reference.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, **ways[number % 3][1]
        )
        assert completion.token_ids == output[0, len(prompt) :].tolist()


def test_sequences_of_a_request_share_its_prompt_and_have_seeds_of_their_own(model: Path) -> None:
    prompt = list(range(60))
    llm = LLM.from_pretrained(model, page_tokens=8)
    together = llm.generate([prompt], SamplingParams(n=4, seed=7, max_tokens=20))
    assert [c.num_cached_tokens for c in together] == [0, 56, 56, 56]
    alone = llm.generate([prompt] * 4, [SamplingParams(seed=7 + k, max_tokens=20) for k in range(4)])
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]
    drawn = llm.generate([prompt], SamplingParams(n=4, max_tokens=20))
    assert len({tuple(c.token_ids) for c in drawn}) == 4
    assert llm.engine.scheduler.stats.used_pages == 0


def test_more_sequences_than_the_queue_has_room_for_wait_for_it(model: Path) -> None:
    llm = LLM.from_pretrained(model, max_queue_size=4, max_running=2)
    found = llm.generate([[1, 2]] * 5, SamplingParams(n=3, max_tokens=4, seed=1))
    assert [c.index for c in found] == [0, 1, 2] * 5
    with pytest.raises(InvalidRequest, match=r"prompt 0: n: expected at most 4 \(max_queue_size\), got 5"):
        llm.generate([[1, 2]], SamplingParams(n=5))


@pytest.mark.parametrize("settings", [{}, {"chunk_tokens": 7}, {"dense_batch_tokens": 300, "max_running": 4}], ids=str)
def test_prompt_logprobs_are_those_of_transformers(model: Path, settings: dict[str, Any]) -> None:
    rng = random.Random(1)
    prompts = [[rng.randrange(256) for _ in range(length)] for length in (1, 2, 40, 41, 290)]
    reference = AutoModelForCausalLM.from_pretrained(model)
    llm = LLM.from_pretrained(model, page_tokens=8, **settings)
    llm.generate(prompts, SamplingParams(max_tokens=1))  # a cached prefix must hide nothing
    found = llm.generate(prompts, SamplingParams(max_tokens=2, prompt_logprobs=3, n=2, seed=1))
    for number, prompt in enumerate(prompts):
        first, second = found[2 * number : 2 * number + 2]
        assert second.prompt_logprobs is None
        assert first.num_cached_tokens == 0
        assert first.prompt_logprobs is not None
        assert len(first.prompt_logprobs) == len(prompt) - 1
        with torch.no_grad():
            rows = reference(torch.tensor([prompt])).logits[0].log_softmax(-1)
        for row, token, entry in zip(rows, prompt[1:], first.prompt_logprobs, strict=False):
            assert entry.token_ids == [token, *row.topk(3).indices.tolist()]
            assert entry.logprobs == pytest.approx([float(row[token]), *row.topk(3).values.tolist()], abs=1e-4)
            surely, perhaps = (int((row > row[token] + by).sum()) for by in (1e-4, -1e-4))
            assert surely < entry.sampled_rank <= perhaps


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"logit_bias": {"100000": 1}}, r"logit_bias: expected token ids in 0\.\."),
        ({"allowed_token_ids": [1, 100000]}, r"allowed_token_ids: expected token ids in 0\.\."),
        ({"bad_words_token_ids": [[1], [2, 100000]]}, r"bad_words_token_ids: expected token ids in 0\.\."),
        ({"structured_outputs": {"regex": "(("}}, r"structured_outputs\.regex: .*unclosed group"),
    ],
)
def test_what_cannot_be_is_refused_and_disturbs_nobody(model: Path, fields: dict[str, Any], message: str) -> None:
    llm = LLM.from_pretrained(model)
    plain = SamplingParams(max_tokens=8, temperature=0.0)
    for _ in range(2):  # the second time the answer is known at once
        results = dict(llm.complete([([1, 2], plain), ([1, 2], SamplingParams.parse(fields)), ([3], plain)]))
        error = results.pop(1)
        assert isinstance(error, InvalidRequest)
        assert re.match(f"(?s){message}", str(error))
        assert [len(c.token_ids) for c in results.values() if isinstance(c, Completion)] == [8, 8]
    assert not llm.engine.has_work


class Compilation:
    """Holds back a grammar until it is told."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.future: Future[Any] = Future()
        self.real = engine.constraints.prepare
        monkeypatch.setattr(engine.constraints, "prepare", self.prepare)

    def prepare(self, params: SamplingParams) -> Future[Any] | None:
        return self.future if self.real(params) is not None else None


def ends(deltas: list[Delta]) -> list[tuple[int, FinishReason]]:
    return [(delta.request_id, delta.finish_reason) for delta in deltas if delta.finish_reason]


def test_a_grammar_that_takes_long_holds_up_nobody_else(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine.from_pretrained(model)
    compilation = Compilation(engine, monkeypatch)
    constrained = SamplingParams.parse({"structured_outputs": {"choice": ["ab"]}, "n": 2})
    for number in range(3):
        engine.add(Request(number, [1, 2], constrained))
    engine.add(Request(3, [1, 2], SamplingParams(max_tokens=4)))
    engine.cancel(0)
    seen = [end for _ in range(12) for end in ends(engine.step())]  # idle steps wait a little, and find nothing
    assert seen == [(0, FinishReason.CANCELLED)] * 2 + [(3, FinishReason.LENGTH)]
    assert engine.scheduler.stats.waiting_requests == 4
    engine.cancel(1, index=1)
    compilation.future.set_result(None)
    monkeypatch.undo()
    texts: dict[tuple[int, int], list[int]] = {}
    while engine.has_work:
        for delta in engine.step():
            texts.setdefault((delta.request_id, delta.index), []).extend(delta.token_ids)
    assert engine.take_refused() == []
    tokenizer = engine.tokenizer
    assert tokenizer is not None
    said = {key: tokenizer.decode(ids) for key, ids in texts.items()}
    assert said == {(1, 0): "ab", (1, 1): "", (2, 0): "ab", (2, 1): "ab"}
    engine.scheduler.check()


def test_a_grammar_that_breaks_down_ends_its_request_with_the_reason(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = LLM.from_pretrained(model)
    plain = SamplingParams(max_tokens=12)
    forced = SamplingParams.parse({"structured_outputs": NUMBER, "max_tokens": 12})
    real, calls = llm.engine.constraints.broken, []

    def broken(slots: list[int]) -> dict[int, RequestError]:
        calls.append(slots)
        return {slots[-1]: InvalidRequest("too complex")} if len(calls) == 3 else real(slots)

    monkeypatch.setattr(llm.engine.constraints, "broken", broken)
    results = dict(llm.complete([([1, 2], plain), ([1, 2, 3], forced)]))
    assert isinstance(results[0], Completion)
    assert len(results[0].token_ids) == 12
    assert str(results[1]) == "too complex"
    assert not llm.engine.has_work
