"""Random JSON schemas of every keyword that is enforced, and random texts that a grammar lets through."""

from __future__ import annotations

from random import Random
from typing import Any

import numpy as np

from nanoflow_backend.sampling.grammar import Grammar, Grammars
from nanoflow_backend.text.tokenizer import Tokenizer

PATTERNS = ("^a", "b$", "^[ab]{1,3}$", "a|b", "\\d", "^$", "[^a]", "^(ab)*$")
FORMATS = ("email", "ipv4", "ipv6", "uuid")  # of which the judge knows as much
NUMBERS = (0, 1, -1, 5, 10, -7, 0.5, 1.25, -0.1, 0.001, 1e-7, 100, 12345, 2**53 - 1, 1 - 2**53, 1e15, 123456.789)
KEYS = ("a", "b", "ab", "c", "é", "a\n", '"')
TEXTS = ("a", "b", "ab", "", "é", "x\ny", 'q"\\')
TYPES = ("integer", "number", "string", "array", "object", "null", "boolean")
DEFINITIONS = ("x", "y")


def random_schema(random: Random, depth: int = 2) -> dict[str, Any]:
    """With definitions, to which it may refer."""
    schema = _object(random, depth)
    return schema | {"$defs": {name: _schema(random, depth - 1) for name in DEFINITIONS}}


def random_text(random: Random, grammars: Grammars, grammar: Grammar, tokenizer: Tokenizer, most_tokens: int) -> str:
    """Follow the masks, with a liking for what ends; empty when `most_tokens` were not enough."""
    grammar, words, output = grammar.fresh(), -(-tokenizer.vocab_size // 32), []
    liked = set(tokenizer.encode('0123456789"ab{}[]:,', add_special_tokens=False))
    closing = set(tokenizer.encode('"}]', add_special_tokens=False))
    while len(output) < most_tokens:
        allowed = np.full((1, words), -1, np.int32)
        grammars.fill([(grammar, 0)], allowed)
        if grammar.failure:
            return ""
        ids = set(np.flatnonzero(np.unpackbits(allowed.view(np.uint8), bitorder="little")).tolist())
        if tokenizer.eos_id in ids and (len(ids) == 1 or random.random() < 0.4):
            return tokenizer.decode(output)
        ids.discard(tokenizer.eos_id)
        wanted = ids & closing if random.random() < 0.3 + len(output) / most_tokens else ids & liked
        output.append(random.choice(sorted(wanted or ids)))
        grammar.advance(output[-1])
    return ""


def _schema(random: Random, depth: int) -> dict[str, Any] | bool:
    return random.random() < 0.7 if random.random() < 0.04 else _object(random, depth)


def _object(random: Random, depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    kinds = random.sample(TYPES, random.choice([0, 1, 1, 1, 1, 2]))
    if kinds:
        schema["type"] = kinds[0] if len(kinds) == 1 else kinds

    def maybe(keyword: str, chance: float, value: Any) -> None:
        if random.random() < chance:
            schema[keyword] = value

    if not kinds or {"integer", "number"} & set(kinds):
        for keyword in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"):
            maybe(keyword, 0.25, _number(random))
        maybe("multipleOf", 0.2, random.choice([1, 2, 3, 7, 0.1, 0.25, 1.5, 97, 0.003, 1e-7]))
    if not kinds or "string" in kinds:
        maybe("minLength", 0.3, random.randrange(4))
        maybe("maxLength", 0.4, random.randrange(2, 6))
        maybe("pattern", 0.3, random.choice(PATTERNS))
        maybe("format", 0.15, random.choice(FORMATS))
    if depth and (not kinds or "array" in kinds):
        maybe("prefixItems", 0.4, [_schema(random, depth - 1) for _ in range(random.randrange(1, 3))])
        maybe("items", 0.5, _schema(random, depth - 1))
        maybe("minItems", 0.3, random.randrange(3))
        maybe("maxItems", 0.5, random.randrange(1, 4))
    if depth and (not kinds or "object" in kinds):
        names = random.sample(KEYS, random.randrange(1, 4))
        maybe("properties", 0.7, {name: _schema(random, depth - 1) for name in names})
        maybe("patternProperties", 0.2, {random.choice(["^x", "^b", "c$", "\\d"]): _schema(random, depth - 1)})
        maybe("additionalProperties", 0.5, random.choice([False, _schema(random, depth - 1)]))
        maybe("required", 0.4, random.sample(KEYS, random.randrange(3)))
        maybe("minProperties", 0.2, random.randrange(3))
        maybe("maxProperties", 0.2, random.randrange(1, 4))
    if depth:
        for keyword in ("allOf", "anyOf", "oneOf"):
            maybe(keyword, 0.12, [_schema(random, depth - 1) for _ in range(random.randrange(1, 4))])
        maybe("$ref", 0.1, f"#/$defs/{random.choice(DEFINITIONS)}")
    maybe("enum", 0.1, [_value(random, 1) for _ in range(random.randrange(1, 4))])
    maybe("const", 0.06, _value(random, 1))
    return schema


def _number(random: Random) -> float:
    return random.choice(NUMBERS) if random.random() < 0.7 else round(random.uniform(-100, 100), random.randrange(4))


def _value(random: Random, depth: int) -> Any:
    match random.randrange(6 if depth else 4):
        case 0:
            return _number(random)
        case 1:
            return random.choice(TEXTS)
        case 2:
            return random.choice([None, True, False])
        case 3:
            return random.randrange(-20, 20)
        case 4:
            return [_value(random, depth - 1) for _ in range(random.randrange(3))]
    return {name: _value(random, depth - 1) for name in random.sample(KEYS, random.randrange(3))}
