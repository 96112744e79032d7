"""This module knows what of a JSON schema a grammar enforces to the letter, and refuses the rest by name.

The grammar library ignores keywords that it does not know, and keeps numbers as doubles. So each schema is read here
first, keyword by keyword, in the sense of draft 2020-12; older drafts' `definitions`, lists of `items` and booleans of
`exclusiveMinimum` keep their meaning.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from decimal import Decimal
from typing import Any

from nanoflow_backend.request import exact_json
from nanoflow_backend.request.exact_json import InexactJson
from nanoflow_backend.request.invalid_request import InvalidRequest

SCHEMA = ("additionalItems", "additionalProperties", "items")  # a schema; a list of them, for older `items`
SCHEMAS = ("allOf", "anyOf", "oneOf", "prefixItems")  # a list
NAMED_SCHEMAS = ("$defs", "definitions", "patternProperties", "properties")
NUMBERS = ("exclusiveMaximum", "exclusiveMinimum", "maximum", "minimum", "multipleOf")
SIZES = ("maxItems", "maxLength", "maxProperties", "minItems", "minLength", "minProperties")
VALUES = ("const", "enum")
BOUNDS = ("exclusiveMaximum", "exclusiveMinimum", "maximum", "minimum")
Bound = tuple[str, int | float | None]  # a keyword and its number
NESTED = (*SCHEMA, *SCHEMAS, *NAMED_SCHEMAS)
OTHERS = ("$anchor", "$id", "$ref", "format", "id", "pattern", "required", "type")
ENFORCED = frozenset((*SCHEMA, *SCHEMAS, *NAMED_SCHEMAS, *NUMBERS, *SIZES, *VALUES, *OTHERS))
# They say something to people and programs, and nothing about what is valid.
ANNOTATIONS = frozenset(
    {
        *("$comment", "default", "deprecated", "description", "discriminator", "example", "examples"),
        *("externalDocs", "readOnly", "title", "writeOnly", "xml"),
    }
)
FORMATS = ("date", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "time", "uri", "uuid")
# An escape could spell a key of `properties` in another way, and what the schema says of that key would not hold.
OPTIONS = {"json_allowed_escapes": 'nrbtf\\"'}  # not "u"
MOST_DIGITS, MOST_DECIMALS = 6, 8  # of multipleOf
DRAFTS = re.compile(r"https?://json-schema\.org/(draft-0[467]|draft/2019-09|draft/2020-12)/schema#?")
# What strings of the output can spell: the library is told to write no escape with a code (OPTIONS).
UNSPELLED = re.compile(r"[\x00-\x07\x0b\x0e-\x1f\x7f]")


class _Unenforced(ValueError):
    """The message names the place in the schema."""


def enforceable(text: str, field: str = "structured_outputs.json") -> str:
    """The schema's text as the grammar library takes it: of the newest draft, all of which it enforces.

    Args:
        field: where the schema stands in the request, for messages.

    Raises:
        InvalidRequest: it is no schema, or has a keyword, a number or a text that would not be enforced.
    """
    try:
        schema = exact_json.loads(text)
        if schema is True:
            schema = {}
        if not isinstance(schema, dict):
            raise _refusal("", f"expected a schema that something is valid under, got {text[:80]}")
        draft = schema.pop("$schema", None)
        if draft is not None and not (isinstance(draft, str) and DRAFTS.fullmatch(draft)):
            raise _refusal("$schema", f"expected a draft of json-schema.org from 4 to 2020-12, got {draft!r}")
        _check(schema, "", _conflict(_bounds(schema, NESTED)))
        return exact_json.dumps(schema)
    except InexactJson as error:
        raise InvalidRequest(f"{field}: {error}") from None
    except RecursionError:
        raise InvalidRequest(f"{field}: nested too deeply") from None
    except _Unenforced as error:
        raise InvalidRequest(f"{field}: {error}") from None


def _check(schema: Any, place: str, conflict: str | None) -> None:
    """Raise _Unenforced where a schema says something that would not be enforced.

    Args:
        conflict: of any two bounds of the whole schema; see `_conflict`.
    """
    if isinstance(schema, bool):
        return
    if not isinstance(schema, Mapping):
        raise _refusal(place, f"expected a schema, got {str(schema)[:80]}")
    for keyword, value in schema.items():
        inner = f"{place}.{keyword}" if place else keyword
        if keyword in SCHEMA:
            for number, item in enumerate(value) if isinstance(value, list) else ():
                _check(item, f"{inner}[{number}]", conflict)
            if not isinstance(value, list):
                _check(value, inner, conflict)
        elif keyword in SCHEMAS:
            for number, item in enumerate(_typed(value, list, inner)):
                _check(item, f"{inner}[{number}]", conflict)
        elif keyword in NAMED_SCHEMAS:
            for name, item in _typed(value, dict, inner).items():
                _check_text(name, inner)
                _check(item, f"{inner}.{name}", conflict)
        elif keyword in (*NUMBERS, *SIZES, *VALUES):
            _check_value(value, inner)
        elif keyword not in ENFORCED and keyword not in ANNOTATIONS and not keyword.startswith("x-"):
            raise _refusal(inner, "this keyword is not enforced; expected none but those that are")
    _check_combinations(schema, place)
    bounds = list(_bounds(schema, SCHEMAS))
    if ("$ref", None) not in bounds or len(bounds) == 1:
        conflict = _conflict(bounds)
    if conflict is not None:  # with a reference among them, bounds of anywhere may meet here
        raise _refusal(place, conflict)


def _check_combinations(schema: Mapping[str, Any], place: str) -> None:
    """What is enforced, but for some values or beside some other keywords only."""
    if "x-guidance" in schema:
        raise _refusal(place, "x-guidance: expected none, it changes what is enforced")
    if schema.get("format", "date") not in FORMATS:
        raise _refusal(place, f"format: expected one of {', '.join(FORMATS)}, for others are not enforced")
    if "additionalItems" in schema and not isinstance(schema.get("items"), list):
        raise _refusal(place, "additionalItems: expected beside a list of items only; after prefixItems it is items")
    if "prefixItems" in schema and isinstance(schema.get("items"), list):
        raise _refusal(place, "items: expected a schema beside prefixItems, got a list")
    if "discriminator" in schema and not {"anyOf", "oneOf"} & schema.keys():
        raise _refusal(place, "discriminator: expected beside anyOf or oneOf only, for it is not enforced")
    required = _typed(schema.get("required", []), list, f"{place}.required")
    for name in required:
        _check_text(_typed(name, str, f"{place}.required"), f"{place}.required")
    is_open = schema.get("additionalProperties") is not False or "patternProperties" in schema
    least = schema.get("minProperties", 0)
    if is_open and isinstance(least, int | float) and least > len(set(required)):
        raise _refusal(
            place,
            f"minProperties: expected at most as many as are required ({len(set(required))}) unless "
            f"additionalProperties is false, for another key may come twice; got {least}",
        )
    if not _can_count_by(schema.get("multipleOf", 1)):
        raise _refusal(
            place,
            f"multipleOf: expected a number of at most {MOST_DIGITS} digits, {MOST_DECIMALS} of them decimals, which "
            f"is as far as the grammar counts, got {schema['multipleOf']}",
        )
    _check_reference(schema.get("$ref", "#"), place)


def _bounds(schema: Any, applicators: tuple[str, ...]) -> Iterator[Bound]:
    """The bounds of numbers in a schema and in those under its applicators, and `("$ref", None)` for each reference."""
    if isinstance(schema, list):
        for item in schema:
            yield from _bounds(item, applicators)
    elif isinstance(schema, Mapping):
        for keyword, value in schema.items():
            if keyword == "$ref":
                yield keyword, None
            elif keyword in BOUNDS and isinstance(value, int | float):
                yield keyword, value
            elif keyword in applicators:
                named = keyword in NAMED_SCHEMAS and isinstance(value, Mapping)
                yield from _bounds(list(value.values()) if named else value, applicators)


def _conflict(bounds: Iterable[Bound]) -> str | None:
    """An integer that a bound excludes is let through all the same if the other bound is the fraction next to it."""
    given = [(keyword, value, keyword.lower().endswith("minimum")) for keyword, value in bounds if value is not None]
    next_to = {(float(n), low): (k, v) for k, v, low in given if v % 1 for n in (math.floor(v), math.ceil(v))}
    for keyword, value, low in given:
        if keyword.startswith("exclusive") and (float(value), not low) in next_to:
            other, fraction = next_to[float(value), not low]
            return (
                f"{keyword}: expected an inclusive bound, or one that is at least 1 away from {other} ({fraction}), "
                f"for {value} itself would be let through"
            )
    return None


def _check_reference(reference: Any, place: str) -> None:
    """A JSON pointer must lead from schema to schema: what lies elsewhere was not checked."""
    fragment = _typed(reference, str, f"{place}.$ref").partition("#")[2]
    steps = fragment.split("/")[1:]
    while steps:
        keyword, *steps = steps
        if keyword in SCHEMAS or keyword in NAMED_SCHEMAS or (keyword == "items" and steps and steps[0].isdigit()):
            if not steps:
                break
            steps = steps[1:]
        elif keyword not in SCHEMA:
            break
    else:
        return
    raise _refusal(place, f"$ref: expected the way to a schema, such as #/$defs/NAME, got {reference!r}")


def _can_count_by(divisor: Any) -> bool:
    if isinstance(divisor, bool) or not isinstance(divisor, int | float):
        return False
    _, digits, exponent = Decimal(repr(divisor)).normalize().as_tuple()
    return len(digits) + max(int(exponent), 0) <= MOST_DIGITS and -int(exponent) <= MOST_DECIMALS


def _check_value(value: Any, place: str) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            _check_text(key, place)
            _check_value(item, place)
    elif isinstance(value, list):
        for item in value:
            _check_value(item, place)
    elif isinstance(value, str):
        _check_text(value, place)
    elif isinstance(value, int | float | Decimal) and not exact_json.is_exact(value):
        raise _refusal(
            place,
            f"expected a number that a double holds, between -2^53 and 2^53, got {value}: other digits would be "
            "enforced; a JSON string, or a choice, a regex or a grammar instead of a schema, keeps all",
        )


def _check_text(text: str, place: str) -> None:
    if UNSPELLED.search(text):
        raise _refusal(place, f"expected no control characters but \\b, \\f, \\n, \\r and \\t, got {text[:80]!r}")


def _typed(value: Any, kind: type, place: str) -> Any:
    if not isinstance(value, kind):
        name = "a list" if kind is list else "an object" if kind is dict else "a string"
        raise _refusal(place, f"expected {name}, got {str(value)[:80]}")
    return value


def _refusal(place: str, why: str) -> _Unenforced:
    return _Unenforced(f"{place.strip('.')[:200]}{': ' if place.strip('.') else ''}{why}")
