"""The table of tensors, the model folder that spells it out, and auto-completion agree."""

import json
import re

import pytest
from support.places import DEMO_MODEL, DROP_IN_FOLDER

from nanoflow_backend.config.engine_config import EngineConfig
from nanoflow_backend.serving.tensors import INPUTS, OUTPUTS, UNSWITCHED, complete_config

ENTRY = re.compile(r'\{ name: "(\w+)", data_type: TYPE_(\w+), dims: \[ ([-\d, ]+) \](, optional: true)? \}')


def entries(section):
    body = re.search(
        rf"^{section} \[\n(.*?)^\]", (DROP_IN_FOLDER / "config.pbtxt").read_text(), re.DOTALL | re.MULTILINE
    )[1]
    found = ENTRY.findall(body)
    assert len(found) == body.count("name:")
    return [(name, kind, tuple(map(int, dims.split(","))), bool(optional)) for name, kind, dims, optional in found]


class ModelConfig:
    """What auto_complete_config is given, as far as it is used."""

    def __init__(self, **given):
        self.inputs, self.outputs, self.policy, self.max_batch_size = [], [], None, None
        self.as_dict = lambda: given

    def add_input(self, entry):
        self.inputs.append(entry)

    def add_output(self, entry):
        self.outputs.append(entry)

    def set_model_transaction_policy(self, policy):
        self.policy = policy

    def set_max_batch_size(self, size):
        self.max_batch_size = size


def test_config_pbtxt_spells_out_the_table():
    assert entries("input") == [(t.name, t.type, t.dims, True) for t in INPUTS]
    assert entries("output") == [(t.name, t.type, t.dims, False) for t in OUTPUTS]


def test_auto_completion_adds_the_same():
    config = ModelConfig()
    complete_config(config)

    def row(entry):
        return (entry["name"], entry["data_type"][5:], tuple(entry["dims"]), entry.get("optional", False))

    assert [row(entry) for entry in config.inputs] == entries("input")
    assert [row(entry) for entry in config.outputs] == entries("output")
    assert (config.policy, config.max_batch_size) == ({"decoupled": True}, 0)


def test_auto_completion_leaves_a_chosen_policy():
    config = ModelConfig(model_transaction_policy={"decoupled": False})
    complete_config(config)
    assert config.policy is None


def test_the_names_of_the_vllm_backend_are_all_there():
    vllm_inputs = {
        "text_input": ("STRING", (1,)),
        "stream": ("BOOL", (1,)),
        "sampling_parameters": ("STRING", (1,)),
        "exclude_input_in_output": ("BOOL", (1,)),
        "return_finish_reason": ("BOOL", (1,)),
        "return_cumulative_logprob": ("BOOL", (1,)),
        "return_logprobs": ("BOOL", (1,)),
        "return_num_input_tokens": ("BOOL", (1,)),
        "return_num_output_tokens": ("BOOL", (1,)),
    }
    vllm_outputs = {
        "text_output": ("STRING", (-1,)),
        "finish_reason": ("STRING", (-1,)),
        "cumulative_logprob": ("FP32", (-1,)),
        "logprobs": ("STRING", (-1,)),
        "num_input_tokens": ("UINT32", (-1,)),  # (1,) there: it takes one prompt a request
        "num_output_tokens": ("UINT32", (-1,)),
    }
    for declared, expected in ((INPUTS, vllm_inputs), (OUTPUTS, vllm_outputs)):
        assert expected.items() <= {t.name: (t.type, t.dims) for t in declared}.items()


def test_a_config_of_the_vllm_backend_may_insist_on_its_inputs_and_dims():
    outputs = [{"name": "text_output", "dims": [-1]}, {"name": "num_input_tokens", "dims": [1]}]
    config = ModelConfig(input=[{"name": "stream", "dims": [1], "optional": False}], output=outputs)
    complete_config(config)
    assert [entry["name"] for entry in config.inputs if "optional" not in entry] == ["stream"]
    assert {t.name for t in OUTPUTS} - {entry["name"] for entry in config.outputs} == {"num_input_tokens"}


def test_every_other_output_has_its_switch():
    switches = {t.name.removeprefix("return_") for t in INPUTS if t.name.startswith("return_")}
    assert switches == {t.name for t in OUTPUTS} - set(UNSWITCHED)


def test_engine_json_is_a_config_and_takes_parameters_of_config_pbtxt():
    file = DROP_IN_FOLDER / "1" / "engine.json"
    assert EngineConfig.load(file).model == str(DEMO_MODEL)
    assert EngineConfig.load(file, {"page_tokens": "64", "prefix_caching": "false"}).page_tokens == 64
    assert set(json.loads(file.read_text())) <= set(EngineConfig.__struct_fields__)


@pytest.mark.parametrize("name", ["text_input", "prompts", "input_ids"])
def test_each_kind_of_prompt_can_be_left_out(name):
    assert (name, True) in {(entry[0], entry[3]) for entry in entries("input")}
