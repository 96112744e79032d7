"""docs/using.md names what the code has: every tensor, sampling field and field of engine.json, and no other."""

import re
from pathlib import Path

from nanoflow_backend.config.engine_config import EngineConfig
from nanoflow_backend.request.sampling_params import SamplingParams
from nanoflow_backend.serving.tensors import INPUTS, OUTPUTS

PAGE = (Path(__file__).parents[2] / "docs" / "using.md").read_text()
NOT_SAMPLING = {"priority", "timeout", "queue_timeout"}  # of the request; in the same places
INNER = {"bad_words_token_ids"}  # what `bad_words` becomes


def names(section: str) -> set[str]:
    """The names in the first column of a section's table."""
    (text,) = re.findall(rf"^## {re.escape(section)}\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    return {name for row in rows for name in re.findall(r"`(\w+)`", row)}


def test_inputs_and_outputs_are_those_of_the_model():
    switches = {f"return_{tensor.name}" for tensor in OUTPUTS}
    assert names("Inputs") == {tensor.name for tensor in INPUTS} - switches | {"return_NAME"}
    assert names("Outputs") == {tensor.name for tensor in OUTPUTS}


def test_sampling_fields_are_those_that_are_read():
    assert names("Sampling fields") == set(SamplingParams.__struct_fields__) - INNER | NOT_SAMPLING


def test_fields_of_engine_json_are_those_of_the_config():
    assert names("engine.json") == set(EngineConfig.__struct_fields__)
