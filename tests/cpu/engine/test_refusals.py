"""Requests that the engine takes and has to give up: each for itself, and counted as what it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.models import checkpoints, tiny_tokenizers
from nanoflow_backend.engine import LLM, Completion, Engine, SamplingParams
from nanoflow_backend.request.internal_error import InternalError
from nanoflow_backend.request.request import Request
from nanoflow_backend.request.sampling_params import InvalidRequest
from nanoflow_backend.sampling import grammar
from nanoflow_backend.scheduler.batch import FinishReason
from nanoflow_backend.text.tokenizer import Tokenizer

NEVER = {"regex": r"[^\s\S]"}  # it compiles, and then no token can come
NOT_COMPILABLE = {"json": {"not": {}}}
PLAIN = SamplingParams(max_tokens=4, temperature=0.0)


def make_model(
    folder: Path, eos_token_id: int | None, vocab_size: int | None = None, extra: tuple[str, ...] = ()
) -> Path:
    tokenizer = Tokenizer.from_pretrained(tiny_tokenizers.bytes_only(folder, extra))
    size = vocab_size or tokenizer.vocab_size
    return checkpoints.save(checkpoints.make("llama", vocab_size=size, eos_token_id=eos_token_id), folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), eos_token_id=256)


@pytest.mark.parametrize("settings", [{}, {"async_scheduling": False}], ids=str)
@pytest.mark.parametrize("outputs", [NEVER, NOT_COMPILABLE], ids=["cannot go on", "not compilable"])
def test_a_refused_request_is_reported_once_and_the_next_call_works(
    model: Path, outputs: dict[str, Any], settings: dict[str, Any]
) -> None:
    llm = LLM.from_pretrained(model, **settings)
    engine = llm.engine
    for n in (1, 3):
        asked = SamplingParams.parse({"max_tokens": 8, "structured_outputs": outputs, "n": n})
        for _ in range(2):  # the second time the compilation is known
            ((number, error),) = llm.complete([("Hi", asked)])
            assert number == 0
            assert isinstance(error, InvalidRequest)
            assert not engine.scheduler.live_ids
        (found,) = llm.generate(["Hi"], PLAIN)
        assert len(found.token_ids) == 4
    ended = engine.scheduler.observer.observed.ended
    assert ended == {FinishReason.LENGTH: 2}, "a refusal is counted by who tells the client"
    engine.scheduler.check()


def test_a_client_that_gives_up_is_counted_as_before(model: Path) -> None:
    engine = Engine.from_pretrained(model)
    engine.add(Request(0, [1, 2], PLAIN))
    engine.step()
    engine.cancel(0)
    while engine.has_work:
        engine.step()
    assert engine.scheduler.observer.observed.ended == {FinishReason.CANCELLED: 1}


def test_a_fault_of_the_grammar_library_ends_its_request_alone_and_quotes_nobody(
    model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    llm = LLM.from_pretrained(model)
    asked = SamplingParams.parse({"structured_outputs": {"choice": ["secret"]}})
    real = grammar._definition

    def definition(outputs: Any) -> Any:
        if outputs.choice == ("secret",):
            raise SystemError(f"panicked at {outputs}")
        return real(outputs)

    monkeypatch.setattr(grammar, "_definition", definition)
    fine = SamplingParams.parse({"structured_outputs": {"choice": ["yes"]}})
    results = dict(llm.complete([("Hi", PLAIN), ("Hi", asked), ("Hi", fine)]))
    assert isinstance(results[0], Completion)
    assert isinstance(results[1], InternalError)
    assert isinstance(results[2], Completion)
    assert results[2].text == "yes"
    assert "SystemError" in caplog.text
    assert "secret" not in caplog.text + str(results[1])
    with pytest.raises(InternalError, match="prompt 0: internal error"):
        llm.generate(["Hi"], asked)


@pytest.mark.parametrize("of_config", [None, 256], ids=["config.json names none", "config.json names another"])
def test_generation_stops_at_the_tokenizers_eos_too(tmp_path: Path, of_config: int | None) -> None:
    folder = make_model(tmp_path, eos_token_id=of_config, extra=("<end_of_turn>",))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end_of_turn>"}))
    turn = 257
    ways: list[dict[str, Any]] = [
        {"logit_bias": {turn: 100}},
        {"logit_bias": {turn: 100}, "min_tokens": 3},
        {"logit_bias": {turn: 100}, "ignore_eos": True},
        {"logit_bias": {256: 100}},
        {"structured_outputs": {"choice": ["yes"]}},
    ]
    asked = [SamplingParams.parse({"max_tokens": 6, "temperature": 0, **way}) for way in ways]
    stopped, later, ignoring, base, structured = LLM.from_pretrained(folder).generate(["Hi"] * len(asked), asked)
    assert (stopped.token_ids, stopped.finish_reason, stopped.stop_reason) == ([turn], "stop", None)
    assert turn not in later.token_ids[:3]
    assert (later.token_ids[3:], later.finish_reason) == ([turn], "stop")
    assert ignoring.token_ids == [turn] * 6
    assert len(base.token_ids) == (6 if of_config is None else 1)
    assert structured.text == "yes"


def test_all_ranks_know_the_tokenizers_eos(tmp_path: Path) -> None:
    """Each samples for itself: one that did not would draw another token while EOS is banned."""
    folder = make_model(tmp_path, eos_token_id=None)
    asked = SamplingParams.parse({"max_tokens": 6, "temperature": 0, "logit_bias": {256: 100}, "min_tokens": 3})
    llms = [LLM.from_pretrained(folder, tensor_parallel=ranks) for ranks in (1, 2)]
    alone, shared = (llm.generate(["Hi", "Oh"], asked) for llm in llms)
    llms[1].close()
    assert [c.token_ids for c in alone] == [c.token_ids for c in shared]
    assert all(c.token_ids[3:] == [256] for c in alone)


def test_a_tokenizer_with_ids_beyond_the_models_rows_has_structured_outputs(tmp_path: Path) -> None:
    folder = make_model(tmp_path, eos_token_id=256, vocab_size=257, extra=("<pad>", "<image>"))
    asked = SamplingParams.parse({"max_tokens": 8, "temperature": 0, "structured_outputs": {"choice": ["yes", "no"]}})
    (found,) = LLM.from_pretrained(folder).generate(["Hi"], asked)
    assert found.text in ("yes", "no")


def test_an_eos_that_the_model_has_no_row_for_is_left_out(tmp_path: Path) -> None:
    folder = make_model(tmp_path, eos_token_id=None, vocab_size=256)
    llm = LLM.from_pretrained(folder)
    assert llm.engine.model_config.eos_token_ids == ()
    with pytest.raises(InvalidRequest, match="no EOS token is named by model or tokenizer"):
        llm.generate(["Hi"], SamplingParams.parse({"structured_outputs": {"choice": ["a"]}}))
