"""KServe v2: the server describes, takes and gives every tensor as the table declares it, in every encoding."""

import contextlib
import json

import grpc
import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from support.server.clients import NUMPY, generate, post
from tritonclient.grpc import service_pb2, service_pb2_grpc

from nanoflow_backend.serving.tensors import INPUTS, OUTPUTS

WIRE = {"STRING": "BYTES"}  # the protocol's name; the other types have their own
CONTENTS = {"BYTES": "bytes_contents", "BOOL": "bool_contents", "INT32": "int_contents"}
ID = "one that nothing runs under"
PROMPT = {"text_input": ["Write a string"]}
CHAT = {"messages": ['[{"role": "user", "content": "Write a string"}]']}
# A value of each input, and what must come with it. Every switch is simply on.
SAMPLES = {
    "text_input": (["Return"], {}),
    "prompts": (["Return", "Write a string"], {}),
    "input_ids": ([5, 6, 7], {}),
    "input_lengths": ([1, 2], {"input_ids": [5, 6, 7]}),
    "cancel": ([True], {}),
    "messages": (CHAT["messages"], {}),
    "tools": (["[]"], CHAT),
    "add_generation_prompt": ([False], CHAT),
    "chat_template_kwargs": (['{"mood": "calm"}'], CHAT),
    "stream": ([False], PROMPT),
    "sampling_parameters": (['{"max_tokens": 4}'], PROMPT),
    "stop": (["never", "there"], PROMPT),
    "stop_words": ([""], PROMPT),
    "bad_words": (["never", "there"], PROMPT),
    "exclude_input_in_output": ([True], PROMPT),
    **{tensor.name: ([True], PROMPT) for tensor in INPUTS if tensor.name.startswith("return_")},
}
DECLARED = {tensor.name: tensor for tensor in (*INPUTS, *OUTPUTS)}


def wire_type(name):
    return WIRE.get(DECLARED[name].type, DECLARED[name].type)


def array(name, values):
    return np.array([v.encode() if isinstance(v, str) else v for v in values], NUMPY[DECLARED[name].type])


def http_infer(server, inputs, binary):
    """{name: (datatype, shape)} of the response."""
    with contextlib.closing(tritonclient.http.InferenceServerClient(server.http_url)) as client:
        made = []
        for name, values in inputs.items():
            tensor = tritonclient.http.InferInput(name, [len(values)], wire_type(name))
            made.append(tensor.set_data_from_numpy(array(name, values), binary_data=binary))
        outputs = [tritonclient.http.InferRequestedOutput(tensor.name, binary_data=binary) for tensor in OUTPUTS]
        result = client.infer("unary", made, outputs=outputs, request_id=ID)
        described = result.get_response()["outputs"]
        for output in described:
            assert result.as_numpy(output["name"]).shape == tuple(output["shape"])
        return {output["name"]: (output["datatype"], output["shape"]) for output in described}


def grpc_infer(server, inputs, raw):
    request = service_pb2.ModelInferRequest(model_name="unary", id=ID)
    for name, values in inputs.items():
        tensor = request.inputs.add(name=name, datatype=wire_type(name), shape=[len(values)])
        if raw:
            made = tritonclient.grpc.InferInput(name, [len(values)], wire_type(name))
            request.raw_input_contents.append(made.set_data_from_numpy(array(name, values))._get_content())
        else:
            getattr(tensor.contents, CONTENTS[wire_type(name)]).extend(array(name, values).tolist())
    with grpc.insecure_channel(server.grpc_url) as channel:
        response = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request, timeout=60)
    return {output.name: (output.datatype, list(output.shape)) for output in response.outputs}


ENCODINGS = {
    "HTTP, JSON": lambda server, inputs: http_infer(server, inputs, binary=False),
    "HTTP, binary": lambda server, inputs: http_infer(server, inputs, binary=True),
    "gRPC, raw": lambda server, inputs: grpc_infer(server, inputs, raw=True),
    "gRPC, typed": lambda server, inputs: grpc_infer(server, inputs, raw=False),
}


@pytest.mark.parametrize("model", ["nanoflow", "unary"])
def test_metadata_is_the_table(demo, model):
    with contextlib.closing(tritonclient.http.InferenceServerClient(demo.http_url)) as client:
        over_http = client.get_model_metadata(model)
    with contextlib.closing(tritonclient.grpc.InferenceServerClient(demo.grpc_url)) as client:
        over_grpc = client.get_model_metadata(model)
        config = client.get_model_config(model).config
    for section, table in (("inputs", INPUTS), ("outputs", OUTPUTS)):
        declared = [(tensor.name, wire_type(tensor.name), list(tensor.dims)) for tensor in table]
        assert [(t["name"], t["datatype"], t["shape"]) for t in over_http[section]] == declared
        assert [(t.name, t.datatype, list(t.shape)) for t in getattr(over_grpc, section)] == declared
    assert all(tensor.optional for tensor in config.input)
    assert config.model_transaction_policy.decoupled == (model == "nanoflow")


def test_every_input_has_a_sample():
    assert set(SAMPLES) == {tensor.name for tensor in INPUTS}


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("name", SAMPLES)
def test_every_input_alone_in_every_encoding(demo, name, encoding):
    values, others = SAMPLES[name]
    outputs = ENCODINGS[encoding](demo, {**others, name: values})
    assert outputs
    for output, (datatype, shape) in outputs.items():
        assert datatype == wire_type(output)
        assert len(shape) == len(DECLARED[output].dims)
        assert all(declared in (-1, size) for declared, size in zip(DECLARED[output].dims, shape, strict=True))
    asked = name.removeprefix("return_")
    assert asked in (name, "prompt_logprobs", "energy_j") or asked in outputs  # these need a parameter, or a GPU


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_output_comes_as_declared(demo, encoding):
    switches = {tensor.name: [True] for tensor in INPUTS if tensor.name.startswith("return_")}
    sampling = ['{"prompt_logprobs": 1, "logprobs": 1}']
    outputs = ENCODINGS[encoding](demo, {"prompts": ["Return", "Write"], "sampling_parameters": sampling, **switches})
    outputs |= ENCODINGS[encoding](demo, {"cancel": [True]})
    declared = {t.name: wire_type(t.name) for t in OUTPUTS if t.name != "energy_j"}  # that needs a GPU
    assert {name: datatype for name, (datatype, _) in outputs.items()} == declared


@pytest.mark.parametrize("name", SAMPLES)
def test_every_input_through_generate(demo, name):
    """The server's own JSON: tensors as scalars or lists, named at the top."""
    values, others = SAMPLES[name]
    body = {key: value[0] if len(value) == 1 else value for key, value in {**others, name: values}.items()}
    assert generate(demo.http_url, "nanoflow", id=ID, **body)


def refusal(server, tensor):
    """What HTTP's /infer answers to one more input beside a prompt: (status, text of the error)."""
    prompt = {"name": "text_input", "datatype": "BYTES", "shape": [1], "data": ["Write"]}
    inputs = [tensor] if tensor["name"] == "text_input" else [prompt, tensor]
    status, text = post(server.http_url, "unary", "infer", {"inputs": inputs})
    return status, json.loads(text)["error"]


@pytest.mark.parametrize("name", SAMPLES)
def test_a_wrong_type_is_the_callers_fault(demo, name):
    wrong = {"name": name, "datatype": "FP64", "shape": [1], "data": [1.5]}
    status, error = refusal(demo, wrong)
    assert status == 400
    assert all(word in error for word in (name, "FP64", wire_type(name))), error


@pytest.mark.parametrize("name", SAMPLES)
def test_a_wrong_shape_is_the_callers_fault(demo, name):
    """One element too many where there is one, a dimension too many where there are any."""
    values, _ = SAMPLES[name]
    shape = [2] if DECLARED[name].dims == (1,) else [1, len(values)]
    data = values * 2 if shape == [2] else values
    status, error = refusal(demo, {"name": name, "datatype": wire_type(name), "shape": shape, "data": data})
    assert status == 400
    assert name in error
    assert f"[{','.join(map(str, shape))}]" in error


def test_an_undeclared_input_is_named(demo):
    status, error = refusal(demo, {"name": "text_inputs", "datatype": "BYTES", "shape": [1], "data": ["a"]})
    assert (status, "text_inputs" in error) == (400, True)


def test_a_stream_has_no_answer_over_infer(demo):
    body = {"inputs": [{"name": "text_input", "datatype": "BYTES", "shape": [1], "data": ["Write"]}]}
    status, text = post(demo.http_url, "nanoflow", "infer", body)
    assert (status, "decoupled" in text) == (501, True)
    body["inputs"].append({"name": "stream", "datatype": "BOOL", "shape": [1], "data": [True]})
    status, text = post(demo.http_url, "unary", "infer", body)
    assert (status, "stream: expected false" in text) == (400, True)
