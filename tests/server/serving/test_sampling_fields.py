"""What clients ask of sampling, in their own words, of the demo model behind the real server."""

from __future__ import annotations

import json
from typing import Any

import pytest
from support.server.clients import generate, grpc, post

from nanoflow_backend.embedded.server import EmbeddedServer
from nanoflow_backend.engine import LLM, SamplingParams

PROMPT = "Write a string"


def asked(demo: EmbeddedServer, **fields: Any) -> dict[str, Any]:
    answer: dict[str, Any] = generate(demo.http_url, "nanoflow", **fields)
    return answer


def test_forms_of_the_output_by_every_way_in(demo: EmbeddedServer) -> None:
    inputs = {"text_input": PROMPT, "exclude_input_in_output": True}
    choice = json.dumps({"choice": ["yes", "no", "perhaps"]})
    answer = asked(demo, **inputs, structured_outputs=choice, return_finish_reason=True)
    assert answer["text_output"] in ("yes", "no", "perhaps")
    assert answer["finish_reason"] == "stop"
    answer = asked(demo, **inputs, guided_regex="[0-9]{4}")
    assert 0 <= int(answer["text_output"]) <= 9999
    schema = {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"]}
    form = {"json": {**schema, "additionalProperties": False}, "disable_any_whitespace": True}
    answer = asked(demo, **inputs, sampling_parameters=json.dumps({"structured_outputs": form}))
    assert json.loads(answer["text_output"]).keys() == {"on"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"structured_outputs": '{"regex": "[0-9"}'}, "structured_outputs.regex: "),
        ({"logit_bias": '{"999999": 1}'}, "logit_bias: expected token ids in 0.."),
        ({"n": 2, "temperature": 0}, "n: expected 1 where temperature is 0"),
        ({"tools": "[]"}, "tools: expected it with messages only"),
    ],
)
def test_errors_name_the_field(demo: EmbeddedServer, fields: dict[str, Any], message: str) -> None:
    status, answer = post(demo.http_url, "nanoflow", "generate", {"text_input": PROMPT, **fields})
    assert (status, message in json.loads(answer)["error"]) == (400, True), answer


@pytest.mark.parametrize("stream", [False, True])
def test_several_sequences_are_those_of_the_engine(demo: EmbeddedServer, demo_llm: LLM, stream: bool) -> None:
    params = {"n": 3, "seed": 5, "max_tokens": 12, "frequency_penalty": 0.5, "bad_words": ["list"]}
    expected = demo_llm.generate([PROMPT], SamplingParams.parse(params))
    counts = {"return_num_output_tokens": True, "return_output_ids": True}
    arguments = {"text_input": PROMPT, "stream": stream, "exclude_input_in_output": True}
    texts, ids = [""] * 3, [[], [], []]  # type: tuple[list[str], list[list[int]]]
    for response in grpc(demo.grpc_url, "nanoflow", **arguments, **counts, sampling_parameters=json.dumps(params)):
        texts = [before + new for before, new in zip(texts, response["text_output"], strict=True)]
        new_ids = iter(response["output_ids"] if isinstance(response["output_ids"], list) else [response["output_ids"]])
        for sequence, count in zip(ids, response["num_output_tokens"], strict=True):
            sequence += [next(new_ids) for _ in range(count)]
    assert texts == [completion.text for completion in expected]
    assert ids == [completion.token_ids for completion in expected]


def test_messages_and_the_logprobs_of_their_prompt(demo: EmbeddedServer, demo_llm: LLM) -> None:
    messages = [{"role": "user", "content": PROMPT}]
    answer = asked(
        demo,
        messages=json.dumps(messages),
        temperature=0,
        max_tokens=8,
        prompt_logprobs=1,
        return_prompt_logprobs=True,
        return_num_input_tokens=True,
    )
    assert demo_llm.tokenizer is not None
    prompt = demo_llm.tokenizer.encode(demo_llm.tokenizer.apply_chat_template(messages), add_special_tokens=False)
    (expected,) = demo_llm.generate([prompt], SamplingParams(max_tokens=8, temperature=0.0, prompt_logprobs=1))
    assert answer["num_input_tokens"] == len(prompt)
    assert answer["text_output"] == expected.text
    nothing, *scores = json.loads(answer["prompt_logprobs"])
    assert nothing is None
    assert expected.prompt_logprobs is not None
    for token, score, entry in zip(prompt[1:], scores, expected.prompt_logprobs, strict=True):
        assert score[str(token)]["logprob"] == pytest.approx(entry.logprobs[0], abs=1e-4)
        assert score[str(token)]["rank"] == entry.sampled_rank


def test_the_body_that_litellm_sends(demo: EmbeddedServer, demo_llm: LLM) -> None:
    """Its parameters are an object of their own, and have lists, which the server takes for declared inputs only."""
    parameters: dict[str, Any] = {"max_tokens": 8, "temperature": 0, "bad_words": [""], "stop_words": [""]}
    (expected,) = demo_llm.generate([PROMPT], SamplingParams(max_tokens=8, temperature=0))
    answer = asked(demo, text_input=PROMPT, parameters=parameters, stream=False)
    assert answer["text_output"] == PROMPT + expected.text
    word = expected.text.split()[-1]
    parameters["stop_words"] = [word, "never there"]
    answer = asked(demo, text_input=PROMPT, parameters=parameters, stream=False)
    assert answer["text_output"] == PROMPT + expected.text[: expected.text.index(word)]
