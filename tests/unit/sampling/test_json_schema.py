"""What a JSON schema lets through, as the independent jsonschema package judges it; and what is refused instead."""

from __future__ import annotations

import decimal
import json
from decimal import Decimal
from itertools import product
from random import Random
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from jsonschema_specifications import REGISTRY
from support.sampling.random_schemas import random_schema, random_text

from benchmarks.models import tiny_tokenizers
from nanoflow_backend.request.invalid_request import InvalidRequest
from nanoflow_backend.request.structured_outputs import StructuredOutputs
from nanoflow_backend.sampling.grammar import Grammar, Grammars
from nanoflow_backend.sampling.json_schema import ANNOTATIONS, ENFORCED, enforceable
from nanoflow_backend.text.tokenizer import Tokenizer

ID = 1234567890123456789  # as databases give them; the nearest double is 21 less
META_SCHEMA = "https://json-schema.org/draft/2020-12"
VOCABULARIES = ("applicator", "content", "core", "format-annotation", "meta-data", "unevaluated", "validation")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_pretrained(tiny_tokenizers.bytes_only(tmp_path_factory.mktemp("bytes")))


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Grammars:
    assert tokenizer.eos_id is not None
    return Grammars(lambda: tokenizer, tokenizer.vocab_size, [tokenizer.eos_id])


def compiled(grammars: Grammars, schema: Any) -> Grammar:
    text = schema if isinstance(schema, str) else json.dumps(schema)
    return grammars.compile(StructuredOutputs(json=text, disable_any_whitespace=True)).result(60)


def accepts(grammar: Grammar, tokenizer: Tokenizer, text: str) -> bool:
    matcher = grammar.fresh().matcher
    tokens = tokenizer.encode(text, add_special_tokens=False)
    return all(matcher.try_consume_tokens([token]) == 1 for token in tokens) and matcher.is_accepting()


def test_whatever_is_written_is_valid(grammars: Grammars, tokenizer: Tokenizer) -> None:
    written = 0
    for seed in range(600):
        random = Random(seed)
        schema = random_schema(random)
        try:
            grammar = compiled(grammars, schema)
        except InvalidRequest:
            continue
        exact = json.loads(json.dumps(schema), parse_float=Decimal)
        judge = Draft202012Validator(exact, format_checker=Draft202012Validator.FORMAT_CHECKER)
        for _ in range(3):
            text = random_text(random, grammars, grammar, tokenizer, most_tokens=120)
            if text:
                with decimal.localcontext(decimal.Context(prec=400)):  # the masks allow long numbers
                    judge.validate(json.loads(text, parse_float=Decimal))
                written += 1
    assert written > 700


def test_every_keyword_of_the_draft_is_enforced_or_says_nothing_or_is_refused_by_name() -> None:
    keywords = set()
    for vocabulary in VOCABULARIES:
        keywords |= REGISTRY.contents(f"{META_SCHEMA}/meta/{vocabulary}")["properties"].keys()
    assert len(keywords) >= 57
    for keyword in keywords - ENFORCED - ANNOTATIONS - {"$schema"}:
        for schema in ({keyword: {}}, {"type": "object", "properties": {"a": {"items": {keyword: {}}}}}):
            with pytest.raises(InvalidRequest, match=rf"structured_outputs\.json: [\w.]*{keyword.replace('$', '.')}:"):
                enforceable(json.dumps(schema))


@pytest.mark.parametrize(
    ("schema", "place"),
    [
        ({"enum": [ID]}, "enum"),
        ({"const": ID}, "const"),
        ({"type": "object", "properties": {"id": {"enum": [1, ID]}}}, r"properties\.id\.enum"),
        ({"const": {"ids": [[2**53]]}}, "const"),
        ({"anyOf": [{"type": "null"}, {"type": "integer", "minimum": ID}]}, r"anyOf\[1\]\.minimum"),
        ({"$defs": {"id": {"maximum": -(2**53)}}}, r"\$defs\.id\.maximum"),
        ({"items": {"multipleOf": 2**53 + 1}}, r"items\.multipleOf"),
        ('{"const": 0.12345678901234567890123}', "const"),
        ('{"const": 1e400}', "const"),
        ('{"const": 1234567890123456789.0}', "const"),
        ('{"maxLength": 1e16}', "maxLength"),
    ],
)
def test_a_number_whose_digits_would_be_lost_is_refused_by_name(schema: Any, place: str) -> None:
    text = schema if isinstance(schema, str) else json.dumps(schema)
    with pytest.raises(InvalidRequest, match=rf"structured_outputs\.json: {place}: expected a number that a double"):
        enforceable(text)


@pytest.mark.parametrize("number", [2**53 - 1, 1 - 2**53, 1234567890123456, 0.1, -2.5e-8, 123456.789])
def test_a_number_that_a_double_holds_is_enforced_to_its_last_digit(
    grammars: Grammars, tokenizer: Tokenizer, number: float
) -> None:
    text = format(Decimal(repr(number)), "f")
    for schema in ({"const": number}, {"enum": [7, number]}):
        grammar = compiled(grammars, schema)
        assert accepts(grammar, tokenizer, text)
        assert not any(accepts(grammar, tokenizer, text[:-1] + digit) for digit in "0123456789" if digit != text[-1])


def test_long_ids_are_exact_as_choices_and_as_texts(grammars: Grammars, tokenizer: Tokenizer) -> None:
    choice = grammars.compile(StructuredOutputs(choice=(str(ID),))).result(60)
    quoted = compiled(grammars, {"enum": [str(ID)]})
    for number in (ID, ID - 21, ID + 1):
        assert accepts(choice, tokenizer, str(number)) == (number == ID)
        assert accepts(quoted, tokenizer, f'"{number}"') == (number == ID)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"x-guidance": {"lenient": True}, "not": {}}, "not: this keyword is not enforced"),
        ({"x-guidance": {"lenient": True}}, "x-guidance: expected none"),
        ({"maxlength": 3}, "maxlength: this keyword is not enforced"),
        ({"type": "string", "nullable": True}, "nullable: this keyword is not enforced"),
        ({"type": "integer", "format": "int64"}, "format: expected one of date, "),
        ({"prefixItems": [{}], "additionalItems": False}, "additionalItems: expected beside a list of items only"),
        ({"prefixItems": [{}], "items": [{}]}, "items: expected a schema beside prefixItems"),
        ({"discriminator": {"propertyName": "a"}}, "discriminator: expected beside anyOf or oneOf only"),
        ({"type": "object", "minProperties": 2, "required": ["a"]}, r"minProperties: expected at most .*\(1\)"),
        ({"exclusiveMinimum": 0, "maximum": 0.5}, "exclusiveMinimum: expected an inclusive bound"),
        ({"exclusiveMaximum": 0, "allOf": [{"minimum": -0.5}]}, "exclusiveMaximum: expected an inclusive bound"),
        ({"$ref": "#/$defs/a", "exclusiveMinimum": 0, "$defs": {"a": {"maximum": 0.5}}}, "exclusiveMinimum: expected"),
        ({"multipleOf": 2.5e-9}, "multipleOf: expected a number of at most 6 digits"),
        ({"multipleOf": 99999989}, "multipleOf: expected a number of at most 6 digits"),
        ({"$ref": "#/x-own/a", "x-own": {"a": {"not": {}}}}, r"\$ref: expected the way to a schema"),
        ({"$ref": "#/default", "default": {"not": {}}}, r"\$ref: expected the way to a schema"),
        ({"const": "\x00"}, "const: expected no control characters"),
        ({"properties": {"\x7f": {}}}, "properties: expected no control characters"),
        ({"$schema": "http://example.com/own"}, r"\$schema: expected a draft of json-schema\.org"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf: expected alternatives that exclude each other"),
        ('{"const": 1, "const": 2}', "an object has the key 'const' twice"),
        ('{"const": NaN}', "const: expected a number that a double holds"),
        ('{"default": Infinity}', "inf is not a JSON number"),
        ('{"allOf":[' * 3000 + "]}" * 3000, "nested too deeply"),
        ("false", "expected a schema that something is valid under"),
        ({"allOf": {}}, "allOf: expected a list"),
    ],
)
def test_what_would_not_be_enforced_is_refused_by_name(grammars: Grammars, schema: Any, message: str) -> None:
    with pytest.raises(InvalidRequest, match=rf"^structured_outputs\.json: ([\w\[\]]+: )?{message}"):
        compiled(grammars, schema)


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"properties": {"a": {"type": "integer"}}}, '{"a":1,"b":2,"b":3}', '{"\\u0061":"x"}'),
        ({"exclusiveMinimum": 0, "exclusiveMaximum": 1}, "0.5", "0"),
        ({"$schema": "http://json-schema.org/draft-04/schema#", "const": 1}, "1", "2"),
        ({"items": [{"type": "null"}], "additionalItems": False}, "[null]", "[null,1]"),
        ({"type": "integer", "minimum": 1, "exclusiveMinimum": True}, "2", "1"),
        ({"oneOf": [{"type": "string"}, {"type": "null"}], "discriminator": {"propertyName": "a"}}, "null", "1"),
        (
            {"type": "object", "additionalProperties": False, "properties": {"a": {}}, "minProperties": 1},
            '{"a":1}',
            "{}",
        ),
        ({"x-note": {"not": {}}, "title": "t", "default": ID, "type": "null"}, "null", "1"),
        ("true", "[1]", "[1"),
    ],
)
def test_one_is_let_through_and_the_other_is_not(
    grammars: Grammars, tokenizer: Tokenizer, schema: Any, good: str, bad: str
) -> None:
    grammar = compiled(grammars, schema)
    assert accepts(grammar, tokenizer, good)
    assert not accepts(grammar, tokenizer, bad)


def test_whatever_stands_in_a_schema_it_is_refused_by_name_or_compiled(grammars: Grammars) -> None:
    things = [None, True, 0, -1.5, 2**70, "", "#", [], [1], {}, {"a": 1}, ["a", {}], {"$ref": 1}]
    for keyword, thing in product(sorted(ENFORCED | ANNOTATIONS | {"$schema", "not", "x-guidance"}), things):
        future = grammars.compile(StructuredOutputs(json=json.dumps({keyword: thing})))
        error = future.exception(60)
        assert error is None or isinstance(error, InvalidRequest), (keyword, thing, error)
        assert error is None or str(error).startswith("structured_outputs.json: ")


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        ('start: "<" %json {"not": {}} ">"', "not: this keyword is not enforced"),
        (f'start: %json {{"const": {ID}}}', "const: expected a number that a double holds"),
        ('start: %json {"x-guidance": {"lenient": true}}', "x-guidance: expected none"),
        ("start: %json {", "expected a JSON schema: "),
    ],
)
def test_a_schema_inside_a_grammar_is_held_to_the_same(grammars: Grammars, grammar: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=rf"structured_outputs\.grammar: %json: {message}"):
        grammars.compile(StructuredOutputs(grammar=grammar)).result(60)


def test_a_schema_inside_a_grammar_is_enforced(grammars: Grammars, tokenizer: Tokenizer) -> None:
    text = r"""// %json {"not": {}}
start: "%json {" /[%]json/ %json {"properties": {"a": {"type": "null"}}} "\"" %json true"""
    grammar = grammars.compile(StructuredOutputs(grammar=text)).result(60)
    assert accepts(grammar, tokenizer, '%json {%json{"a":null}"[1]')
    assert not accepts(grammar, tokenizer, '%json {%json{"\\u0061":1}"[1]')
