"""Grammars of a tokenizer that is not the model's size, and faults of the library that makes them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from support.sampling.masks import ids, make, params

from benchmarks.models import tiny_tokenizers
from nanoflow_backend.request.internal_error import InternalError
from nanoflow_backend.request.structured_outputs import StructuredOutputs
from nanoflow_backend.sampling import grammar
from nanoflow_backend.sampling.constraints import Constraints
from nanoflow_backend.sampling.grammar import Grammars
from nanoflow_backend.scheduler.batch import Admission
from nanoflow_backend.text.tokenizer import Tokenizer


@pytest.fixture(scope="module", params=["llama2", "llama3"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = getattr(tiny_tokenizers, request.param)(tmp_path_factory.mktemp(request.param))
    return Tokenizer.from_pretrained(folder)


def test_ids_that_only_the_tokenizer_has_are_never_allowed(tmp_path: Path) -> None:
    """A padding token was added, and the model's rows were not: here so many that masks have words more than it."""
    tokenizer = Tokenizer.from_pretrained(tiny_tokenizers.bytes_only(tmp_path, [f"<pad{n}>" for n in range(70)]))
    rows = tokenizer.vocab_size - 69
    constraints = make(tokenizer, rows)
    asked = params(structured_outputs={"regex": "(yes|no)+"})
    constraints.admit([Admission(0, 1, asked, [1]), Admission(1, 1, params(allowed_token_ids=[3]), [1])])
    for token in tokenizer.encode("yesno", add_special_tokens=False):
        allowed, other = ids(constraints.masks([0, 1]))
        assert token in allowed
        assert max(allowed) < rows
        assert other == {3}
        constraints.observe([0], [token])
    assert ids(constraints.masks([0])) == [{*tokenizer.encode("yn", add_special_tokens=False), tokenizer.eos_id}]


def test_a_grammar_that_only_ids_beyond_the_model_would_continue_says_so(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_pretrained(tiny_tokenizers.bytes_only(tmp_path, ["<pad>"]))
    constraints = make(tokenizer, tokenizer.vocab_size - 1)
    constraints.admit([Admission(0, 1, params(structured_outputs={"grammar": "start: <pad>"}), [1])])
    assert ids(constraints.masks([0])) == [{tokenizer.eos_id}]
    assert "leaves no token of the model" in str(constraints.broken([0])[0])


class Failing:
    """A matcher with a fault in one of its functions; the library's executor, which wants its own, cannot take it."""

    def __init__(self, matcher: Any, fault: str) -> None:
        self._matcher, self._fault = matcher, fault

    def __getattr__(self, name: str) -> Any:
        if name == self._fault:
            raise SystemError("the words of a client")
        return getattr(self._matcher, name)


@pytest.mark.parametrize(
    ("fault", "doing", "kind"),
    [
        ("deep_copy", "copying a grammar", "SystemError"),
        ("consume_token", "following a grammar", "SystemError"),
        ("executor", "finding what a grammar allows", "TypeError"),
    ],
)
def test_a_fault_of_the_grammar_library_fails_one_request_and_quotes_nobody(
    tokenizer: Tokenizer, fault: str, doing: str, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    grammars = Grammars(lambda: tokenizer, tokenizer.vocab_size, [tokenizer.eos_id])
    constraints = Constraints(tokenizer.vocab_size, [tokenizer.eos_id], grammars)
    good, bad = (params(structured_outputs={"regex": text}) for text in ("aa", "ab"))
    compiled = grammars.compile(bad.structured_outputs).result(60)
    if fault == "deep_copy":
        compiled.matcher = Failing(compiled.matcher, fault)
    constraints.admit([Admission(0, 1, good, [1]), Admission(1, 1, bad, [1])])
    failing = constraints._by_slot[1].grammar
    if fault == "executor":
        failing.matcher = Failing(failing.matcher, fault)
    before, _ = ids(constraints.masks([0, 1]))
    if fault == "consume_token":
        failing.matcher = Failing(failing.matcher, fault)
    (token,) = tokenizer.encode("aa", add_special_tokens=False)[-1:]
    constraints.observe([0, 1], [token, token])
    after, of_failed = ids(constraints.masks([0, 1]))
    assert token in before & after
    assert of_failed == {tokenizer.eos_id}
    assert constraints.broken([0, 1]).keys() == {1}
    failure = constraints.broken([0, 1])[1]
    assert isinstance(failure, InternalError)
    assert re.fullmatch(f"internal error [0-9a-f]{{8}} while {doing}: .*", str(failure))
    (record,) = caplog.records
    assert f"error {str(failure).split()[2]}: {doing} failed with {kind} at " in record.getMessage()
    assert "words" not in caplog.text + str(failure)


def test_a_compilation_that_fails_unexpectedly_is_tried_again(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    grammars, outputs = (
        Grammars(lambda: tokenizer, tokenizer.vocab_size, [tokenizer.eos_id]),
        StructuredOutputs(regex="a"),
    )
    with monkeypatch.context() as patch:
        patch.setattr(grammar, "_definition", lambda outputs: 1 / 0)
        with pytest.raises(InternalError, match=r"internal error [0-9a-f]{8} while compiling a grammar"):
            grammars.compile(outputs).result(60)
    assert "ZeroDivisionError at" in caplog.text
    assert grammars.compile(outputs).result(60).failure is None
