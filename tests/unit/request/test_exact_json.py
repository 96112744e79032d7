"""JSON that keeps every digit, beside decimal arithmetic."""

from __future__ import annotations

import json
from decimal import Decimal
from random import Random
from typing import Any

import pytest

from nanoflow_backend.request import exact_json
from nanoflow_backend.request.exact_json import InexactJson
from nanoflow_backend.request.sampling_params import SamplingParams
from nanoflow_backend.request.structured_outputs import StructuredOutputs


def test_no_digit_is_lost_on_the_way_to_the_engine() -> None:
    random = Random(0)
    for _ in range(500):
        digits = "".join(random.choice("0123456789") for _ in range(random.randrange(1, 40))).lstrip("0") or "0"
        text = random.choice(["", "-"]) + digits + random.choice(["", ".5", ".0", f".{digits}", "e5", "e-30", "e400"])
        body = f'{{"structured_outputs": {{"json": {{"const": [{text}]}}}}}}'
        asked = SamplingParams.parse(exact_json.loads(body)).structured_outputs
        assert asked == StructuredOutputs.parse(f'{{"json": {{"const": [{text}]}}}}')
        assert asked is not None
        assert asked.json is not None
        assert json.loads(asked.json, parse_float=Decimal, parse_int=Decimal) == {"const": [Decimal(text)]}


def test_a_number_is_a_float_where_that_says_the_same() -> None:
    value = exact_json.loads("[0.1, 1e3, 1.00000000000000000001, 7]")
    assert [type(number) for number in value] == [float, float, Decimal, int]
    assert [exact_json.is_exact(number) for number in value] == [True, True, False, True]
    assert not exact_json.is_exact(2**53)
    assert SamplingParams.parse({"temperature": exact_json.loads("0.70000000000000000001")}).temperature == 0.7


@pytest.mark.parametrize("text", ["{", '{"a": 1, "a": 1}', "[" * 100_000, "1e99999999999999999999"])
def test_what_would_not_be_kept_is_refused(text: str) -> None:
    with pytest.raises(InexactJson):
        exact_json.loads(text)


def test_a_key_that_is_there_twice_is_found_in_one_walk() -> None:
    """Comparing all keys with each other would take this object half an hour."""
    keys = [f'"{number}": 0' for number in range(300_000)]
    with pytest.raises(InexactJson, match="an object has the key '299999' twice"):
        exact_json.loads("{" + ", ".join([*keys, keys[-1]]) + "}")


@pytest.mark.parametrize("value", [float("nan"), {"a": [float("inf")]}, "\ud800", object()])
def test_what_json_cannot_say_is_refused(value: Any) -> None:
    with pytest.raises(InexactJson):
        exact_json.dumps(value)
