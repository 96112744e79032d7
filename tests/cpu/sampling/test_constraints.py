"""Constraints: masks that say exactly what may come next, however a request came to where it is."""

from __future__ import annotations

import json
import re
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from support.sampling.masks import ids, make, params
from transformers import NoBadWordsLogitsProcessor

from benchmarks.models import tiny_tokenizers
from nanoflow_backend.request.sampling_params import InvalidRequest, SamplingParams
from nanoflow_backend.request.structured_outputs import StructuredOutputs
from nanoflow_backend.sampling.constraints import bits_of
from nanoflow_backend.sampling.grammar import CACHED_GRAMMARS, Grammars
from nanoflow_backend.scheduler.batch import Admission
from nanoflow_backend.text.bad_words import encode_bad_words
from nanoflow_backend.text.tokenizer import Tokenizer

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
GBNF = 'root ::= "<" letter+ ">"\nletter ::= [a-c]'
LARK = 'start: "x" NUMBER\nNUMBER: /[0-9]{1,3}/'


@pytest.fixture(scope="module", params=["llama2", "llama3"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = getattr(tiny_tokenizers, request.param)(tmp_path_factory.mktemp(request.param))
    return Tokenizer.from_pretrained(folder)


def written(tokenizer: Tokenizer, asked: SamplingParams, random: Random, preempt: bool) -> str:
    """A text of tokens drawn from the masks, short ones where possible; EOS ends it."""
    constraints, slot, output = make(tokenizer), 3, []
    constraints.admit([Admission(slot, 2, asked, [7, 7])])
    while True:
        (allowed,) = ids(constraints.masks([slot]))
        assert allowed, "nothing may come next"
        assert max(allowed) < tokenizer.vocab_size
        if tokenizer.eos_id in allowed and (len(allowed) == 1 or random.random() < 0.3):
            return tokenizer.decode(output)
        output.append(random.choice(sorted(allowed - {tokenizer.eos_id})))
        assert len(output) < 500, "it never ends"
        constraints.observe([slot], output[-1:])
        if preempt and random.random() < 0.3:
            slot = (slot + 1) % 8
            constraints.admit([Admission(slot, 2, asked, [7, 7, *output])])


@pytest.mark.parametrize("preempt", [False, True])
@pytest.mark.parametrize(
    ("asked", "pattern"),
    [
        ({"choice": ["yes", "no", "yes and no", "né 😀"]}, "yes|no|yes and no|né 😀"),
        ({"regex": r"[ab]{2,6}-\d{3}"}, r"[ab]{2,6}-\d{3}"),
        ({"grammar": GBNF}, "<[a-c]+>"),
        ({"grammar": LARK}, "x[0-9]{1,3}"),
    ],
    ids=["choice", "regex", "gbnf", "lark"],
)
def test_what_is_drawn_has_the_form(tokenizer: Tokenizer, asked: dict[str, Any], pattern: str, preempt: bool) -> None:
    for seed in range(4):
        text = written(tokenizer, params(structured_outputs=asked), Random(seed), preempt)
        assert re.fullmatch(pattern, text), text


def test_json_follows_its_schema(tokenizer: Tokenizer) -> None:
    asked = {"json": SCHEMA, "disable_any_whitespace": True}
    for seed in range(4):
        value = json.loads(written(tokenizer, params(structured_outputs=asked), Random(seed), preempt=False))
        assert value.keys() == {"name", "age"}
        assert len(value["name"]) <= 5
        assert isinstance(value["age"], int)


def test_everything_that_has_the_form_is_allowed(tokenizer: Tokenizer) -> None:
    constraints = make(tokenizer)
    constraints.admit([Admission(0, 1, params(structured_outputs={"regex": " ?(the dog|a cat)s?"}), [1])])
    for token in (*tokenizer.encode("the dogs", add_special_tokens=False), tokenizer.eos_id):
        (allowed,) = ids(constraints.masks([0]))
        assert token in allowed
        constraints.observe([0], [token])


def test_only_constrained_rows_are_masked(tokenizer: Tokenizer) -> None:
    constraints = make(tokenizer)
    assert not constraints
    plain, forced = params(), params(structured_outputs={"choice": ["a"]})
    constraints.admit([Admission(0, 1, plain), Admission(1, 1, forced, [1]), Admission(2, 1, forced, [1])])
    assert constraints.masks([0]) is None
    masks = constraints.masks([2, 0, 1])
    assert masks is not None
    assert masks.rows == [0, 2]
    constraints.admit([Admission(1, 1, plain), Admission(2, 1, plain)])
    assert not constraints


def test_bad_words_are_those_of_transformers() -> None:
    random, vocabulary = Random(3), 12
    words = ((4,), (1, 2), (1, 3), (5, 5, 5), (2, 1, 2, 0))
    reference = NoBadWordsLogitsProcessor([list(word) for word in words], eos_token_id=11)
    constraints = make(None, vocabulary)
    constraints.admit([Admission(0, 2, params(bad_words_token_ids=words), [1, 1])])
    output: list[int] = []
    banned_at_once = set()
    for _ in range(300):
        (allowed,) = ids(constraints.masks([0]))
        scores = torch.zeros(1, vocabulary)
        if output:
            scores = reference(torch.tensor([output]), scores)
        else:
            scores[0, 4] = -torch.inf
        assert allowed == set(torch.where(scores[0] > -torch.inf)[0].tolist())
        banned_at_once.add(vocabulary - len(allowed))
        output.append(random.choice([token for token in (0, 1, 2, 3, 5) if token in allowed]))
        constraints.observe([0], output[-1:])
    assert banned_at_once >= {1, 2, 3}


def test_bad_words_become_tokens_as_in_vllm(tokenizer: Tokenizer) -> None:
    asked = encode_bad_words(params(bad_words=["dog", "the quick"]), tokenizer)
    assert asked.bad_words == ()
    texts = {tokenizer.decode(list(word)).strip() for word in asked.bad_words_token_ids}
    assert texts == {"dog", "the quick"}
    assert encode_bad_words(params(), None) == params()
    with pytest.raises(InvalidRequest, match="bad_words: expected none"):
        encode_bad_words(params(bad_words=["dog"]), None)
    with pytest.raises(InvalidRequest, match="bad_words: expected valid Unicode"):
        encode_bad_words(params(bad_words=["\ud800"]), tokenizer)


def test_what_is_required_wins_where_bans_leave_nothing(tokenizer: Tokenizer) -> None:
    constraints, eos = make(tokenizer), tokenizer.eos_id
    (word,) = tokenizer.encode("a", add_special_tokens=False)[-1:]
    piece = tokenizer.token_bytes()[word].decode()
    forced = {"structured_outputs": {"choice": [piece]}}
    constraints.admit(
        [
            Admission(0, 1, params(**forced, bad_words_token_ids=[[word]]), [1]),
            Admission(1, 1, params(allowed_token_ids=[5, 6], bad_words_token_ids=[[5]]), [1]),
            Admission(2, 1, params(allowed_token_ids=[5], bad_words_token_ids=[[5]]), [1]),
            Admission(3, 1, params(**forced, min_tokens=5), [1, word]),  # its grammar has come to its end
            Admission(4, 1, params(structured_outputs={"regex": "(aa)*"}, min_tokens=3, stop_token_ids=[5]), [1]),
        ]
    )
    found = ids(constraints.masks(range(5)))
    assert word in found[0]
    assert found[1:4] == [{6}, {5}, {eos}]
    assert eos not in found[4]
    constraints.observe([3], [eos])
    assert ids(constraints.masks([3])) == [{eos}], "beyond the end, until the engine has noticed"
    assert constraints.broken(range(5)) == {}


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"regex": "[0-9"}, r"structured_outputs\.regex: .*unclosed character class"),
        ({"json": {"type": "nonsense"}}, r"structured_outputs\.json: .*nonsense"),
        ({"json": "{"}, r"structured_outputs\.json: "),
        ({"json": {"type": "object", "not": {}}}, r"structured_outputs\.json: .*not"),
        ({"grammar": "start: missing"}, r"structured_outputs\.grammar: .*missing"),
        ({"grammar": 'root ::= "a'}, r"structured_outputs\.grammar: "),
        ({"json_object": True, "whitespace_pattern": "("}, r"structured_outputs\.json_object: "),
    ],
)
def test_what_is_no_grammar_is_refused_by_name(tokenizer: Tokenizer, asked: dict[str, Any], message: str) -> None:
    compiled = make(tokenizer).prepare(params(structured_outputs=asked))
    assert compiled is not None
    with pytest.raises(InvalidRequest, match=f"(?s){message}"):
        compiled.result(60)


def test_without_a_tokenizer_there_are_no_grammars() -> None:
    compiled = make(None).prepare(params(structured_outputs={"regex": "a"}))
    assert compiled is not None
    with pytest.raises(InvalidRequest, match="structured_outputs: expected none, for the model has no tokenizer"):
        compiled.result(60)


def test_a_grammar_is_compiled_once_and_few_are_kept(tokenizer: Tokenizer) -> None:
    grammars = Grammars(lambda: tokenizer, tokenizer.vocab_size, [tokenizer.eos_id])
    first = grammars.compile(StructuredOutputs(regex="a"))
    assert grammars.compile(StructuredOutputs.parse('{"regex": "a"}')) is first
    for number in range(CACHED_GRAMMARS):
        grammars.compile(StructuredOutputs(regex=f"b{number}"))
    assert len(grammars._compiled) == CACHED_GRAMMARS
    assert grammars.compile(StructuredOutputs(regex="a")) is not first


def test_a_grammar_that_cannot_go_on_says_why(tokenizer: Tokenizer) -> None:
    constraints = make(tokenizer)
    constraints.admit([Admission(0, 1, params(structured_outputs={"choice": ["a"]}), [1])])
    assert constraints.broken([0]) == {}
    constraints.observe([0], tokenizer.encode("zzz", add_special_tokens=False)[-1:])  # as after a limit was hit
    assert constraints.broken([0, 1]).keys() == {0}
    assert ids(constraints.masks([0])) == [{tokenizer.eos_id}]


@pytest.mark.parametrize("size", [1, 31, 32, 33, 97])
def test_bits(size: int) -> None:
    tokens = set(range(0, size, 3))
    bits = bits_of(tokens, size)
    assert {token for token in range(size) if bits[token // 32] >> token % 32 & 1} == tokens
    assert bits.dtype == np.int32
    assert len(bits) == -(-size // 32)
