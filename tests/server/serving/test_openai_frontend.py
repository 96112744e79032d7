"""The server's OpenAI-compatible frontend, its `--backend vllm` format: what it sends, and what it reads back.

The frontend is not in the pip server. tests/support/server/openai_frontend.json holds, for OpenAI requests, the tensors
that its request converter makes of them (python/openai/openai_frontend/engine/utils/triton.py of the server's
repository, 2026); `read` below holds what its response code demands, and makes of it.
"""

import json

import grpc
import pytest
import tritonclient.grpc
from support.places import ROOT
from tritonclient.grpc import service_pb2, service_pb2_grpc

from nanoflow_backend.engine import SamplingParams

CASES = json.loads((ROOT / "tests" / "support" / "server" / "openai_frontend.json").read_text())
CONTENTS = {"BYTES": "bytes_contents", "BOOL": "bool_contents"}


def infer(url, inputs):
    """All responses; (response, final) each. Raises what the server says."""
    request = service_pb2.ModelInferRequest(model_name="nanoflow")
    request.parameters["triton_enable_empty_final_response"].bool_param = True
    for name, (datatype, values) in inputs.items():
        tensor = request.inputs.add(name=name, datatype=datatype, shape=[len(values)])
        data = [value.encode() for value in values] if datatype == "BYTES" else values
        getattr(tensor.contents, CONTENTS[datatype]).extend(data)
    responses = []
    with grpc.insecure_channel(url) as channel:
        for message in service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelStreamInfer(iter([request])):
            if message.error_message:
                raise ValueError(message.error_message)
            response = message.infer_response
            responses.append((response, response.parameters["triton_final_response"].bool_param))
    return responses


def read(responses, stream):
    """(text, prompt tokens, completion tokens, log-probabilities as OpenAI gives them), as the frontend reads them."""
    assert [final for _, final in responses] == [False] * (len(responses) - 1) + [True]
    assert stream or len(responses) <= 2
    texts, logprobs, prompt_tokens, completion_tokens = [], [], [], 0
    for response, _ in responses:
        result = tritonclient.grpc.InferResult(response)
        outputs = {output.name: output for output in response.outputs}
        if "text_output" in outputs:  # it reads the bytes of the first string, without a look at how many there are
            assert (outputs["text_output"].datatype, list(outputs["text_output"].shape)) == ("BYTES", [1])
            texts.append(result.as_numpy("text_output")[0].decode())
        if {"num_input_tokens", "num_output_tokens"} <= outputs.keys():
            for name in ("num_input_tokens", "num_output_tokens"):
                assert outputs[name].datatype in ("UINT32", "INT32")
                assert list(outputs[name].shape) == [1]
            prompt_tokens.append(int(result.as_numpy("num_input_tokens")[0]))
            completion_tokens += int(result.as_numpy("num_output_tokens")[0])
        if "logprobs" in outputs:
            for entry in json.loads(result.as_numpy("logprobs")[0]) or []:
                ranked = sorted(entry.values(), key=lambda token: token["rank"])
                logprobs.append({token["decoded_token"]: token["logprob"] for token in ranked})
    assert len(set(prompt_tokens)) == 1
    return "".join(texts), prompt_tokens[0], completion_tokens, logprobs


ANSWERED = {case["name"]: case for case in CASES if "engine" in case}
TOOLS = {case["name"]: case for case in CASES if "json" in case}
REFUSED = {case["name"]: case for case in CASES if "error" in case}


@pytest.mark.parametrize("name", ANSWERED)
def test_what_the_frontend_reads_is_what_the_engine_says(demo, demo_llm, name):
    case = ANSWERED[name]
    prompt = case["inputs"]["text_input"][1][0]
    params = {key: tuple(value) if isinstance(value, list) else value for key, value in case["engine"].items()}
    (completion,) = demo_llm.generate([case.get("engine_prompt", prompt)], SamplingParams(**params))
    stream = case["inputs"]["stream"][1][0]
    text, prompt_tokens, completion_tokens, logprobs = read(infer(demo.grpc_url, case["inputs"]), stream)
    assert text == (prompt if case.get("echoes") else "") + completion.text
    assert prompt_tokens == completion.num_input_tokens
    assert completion_tokens == len(completion.token_ids)
    assert len(logprobs) == (len(completion.token_ids) if "logprobs" in case["engine"] else 0)
    for shown, entry in zip(logprobs, completion.logprobs or (), strict=True):
        assert next(iter(shown.values())) == pytest.approx(max(entry.logprobs), rel=1e-4)
        assert all(isinstance(token, str) for token in shown)


@pytest.mark.parametrize("name", TOOLS)
def test_a_tools_arguments_are_json_of_its_schema(demo, name):
    text, *_ = read(infer(demo.grpc_url, TOOLS[name]["inputs"]), stream=False)
    arguments = json.loads(text)
    assert arguments.keys() == TOOLS[name]["json"].keys()
    assert all(value in TOOLS[name]["json"][key] for key, value in arguments.items())


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_says_why(demo, name):
    with pytest.raises(ValueError, match=REFUSED[name]["error"]):
        infer(demo.grpc_url, REFUSED[name]["inputs"])


def test_the_model_has_what_the_frontend_looks_for(demo):
    """It takes the name of the input that answers `echo` from the model's configuration, and sends to it."""
    with tritonclient.grpc.InferenceServerClient(demo.grpc_url) as client:
        config = client.get_model_config("nanoflow").config
    assert "exclude_input_in_output" in [tensor.name for tensor in config.input]
    assert config.model_transaction_policy.decoupled
