"""Parses a request given as Python values, as the server would hand it over."""

import json

import numpy as np

from nanoflow_backend.serving.call import ALL_OUTPUTS, Call
from nanoflow_backend.serving.limits import Limits
from nanoflow_backend.serving.tensors import INPUTS

VOCAB_SIZE = 400
LIMITS = Limits(
    prompt_bytes=2**16,
    max_model_tokens=4096,
    cache_tokens=2**16,
    vocab_size=VOCAB_SIZE,
    token_text_bytes=40,
    max_answer_bytes=2**29,
    max_queue_size=4096,
    max_queue_us=0,
)


def tensor(name, value):
    kind = next(t.type for t in INPUTS if t.name == name)
    if kind == "STRING":
        texts = value if isinstance(value, list) else [value]
        return np.array([text if isinstance(text, bytes) else text.encode() for text in texts], dtype=np.object_)
    return np.array(value, dtype={"BOOL": bool, "INT32": np.int32}[kind]).reshape(-1)


def parse(tokenizer, *, requested=ALL_OUTPUTS, parameters=None, limits=LIMITS, **inputs):
    sampling = inputs.get("sampling_parameters")
    if isinstance(sampling, dict):
        inputs["sampling_parameters"] = json.dumps(sampling)
    tensors = {name: tensor(name, value) for name, value in inputs.items()}
    calls = Call.parse(tensors, parameters or {}, requested, tokenizer, limits)
    return calls if {"prompts", "input_lengths"} & set(inputs) else calls[0]
