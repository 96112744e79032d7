"""docs/from-vllm-backend.md says of each argument of vLLM what the code does with it, and names no other."""

import json
import re
from pathlib import Path

from nanoflow_backend.config.vllm_args import DECISIVE, IDLE, LOCATING, TRANSLATED

PAGE = (Path(__file__).parents[2] / "docs" / "from-vllm-backend.md").read_text()


def rows(section):
    """The cells of a section's table."""
    (text,) = re.findall(rf"^### {section}.*?\n(.*?)(?=^##|\Z)", PAGE, re.M | re.S)
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| `")]


def names(text):
    return re.findall(r"`([^`\n]+)`", text)


def test_translated_arguments_and_their_fields():
    table = {argument.strip("`"): field.strip("`") for argument, field, _ in rows("Translated")}
    assert table == {argument: field for argument, (field, _) in TRANSLATED.items()}
    assert set(names(PAGE)) >= LOCATING


def test_refused_arguments_and_the_values_that_are_accepted():
    table = {
        argument.strip("`"): [json.loads(value) for value in names(accepted)] for argument, accepted, _ in rows("Ref")
    }
    assert table == {argument: list(neutral) for argument, neutral in DECISIVE.items()}


def test_arguments_without_effect_and_the_reason_in_the_warning():
    assert {why: " ".join(names(idle)) for idle, why in rows("Without")} == {
        why: " ".join(idle.split()) for why, idle in IDLE.items()
    }
