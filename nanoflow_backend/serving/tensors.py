"""This table of the model's tensors is what config.pbtxt, auto-completion, parsing and responses derive from.

Names and meanings are those of Triton's vLLM backend, so that its clients work unchanged; what is new here says so.

Where the server has parameters of responses, the last one about a prompt has finish_reason, stop_reason,
num_input_tokens, total_output_tokens and num_cached_tokens as such, as far as they are not among its outputs.

A request with `prompts`, or with `input_lengths`, has several prompts. When streaming, each response is about one of
them (`batch_index`); otherwise the one response has an element for each prompt in every output, in their order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec
from numpy.typing import NDArray

from nanoflow_backend.request.sampling_params import InvalidRequest

Arrays = Mapping[str, NDArray[Any]]  # tensors by name; strings are objects: bytes
Parameters = Mapping[str, str | int]  # of a response; servers before 25.02 have none


class Tensor(msgspec.Struct, frozen=True):
    """One input or output of the model: its name, type, dims and meaning."""

    name: str
    type: Literal["STRING", "BOOL", "INT32", "UINT32", "FP32"]
    dims: tuple[int, ...]
    meaning: str


# Where `n` sequences were asked for, outputs of a sequence have `n` elements, in every response.
# Every output but `UNSWITCHED` is sent where the client sets the input `return_<name>`, or where it names the outputs
# that it wants and they are not simply all (a request that names none, as every HTTP one, asks for all).
OUTPUTS = (
    Tensor("text_output", "STRING", (-1,), "the new text; all of it, after the prompt, when not streaming"),
    Tensor("finish_reason", "STRING", (-1,), '"None" before the end; then "stop", "length" or "cancelled"'),
    Tensor("cumulative_logprob", "FP32", (-1,), "sum of the log-probabilities of all output tokens so far"),
    Tensor("logprobs", "STRING", (-1,), 'JSON per new token: {id: {"logprob", "rank", "decoded_token"}}; or "null"'),
    Tensor("num_input_tokens", "UINT32", (-1,), "tokens of the prompt"),
    Tensor("num_output_tokens", "UINT32", (-1,), "new tokens in this response"),
    # Not in the vLLM backend. Over HTTP the server itself can lose responses of a fast stream and say nothing: a stream
    # is whole if a response with `total_output_tokens` came and the `num_output_tokens` of all responses add up to it.
    Tensor("total_output_tokens", "UINT32", (-1,), "all output tokens; in the last response only"),
    # Of several sequences one after the other: `num_output_tokens` says where each one's end.
    Tensor("output_ids", "INT32", (-1,), "ids of the new tokens; always sent when the prompt came as ids"),
    Tensor("prompt_logprobs", "STRING", (-1,), "as logprobs, per prompt token, null for the first; in one response"),
    Tensor("stop_reason", "STRING", (-1,), 'the stop string or stop token id that ended the output, else "None"'),
    Tensor("num_cached_tokens", "UINT32", (-1,), "prompt tokens that were in the prefix cache"),
    # What a prompt took, all its sequences together; in the last response only. Times from when the request came.
    Tensor("queue_time_s", "FP32", (-1,), "until it was admitted"),
    Tensor("prefill_time_s", "FP32", (-1,), "from then to its first token"),
    Tensor("decode_time_s", "FP32", (-1,), "from then to its last"),
    Tensor("total_time_s", "FP32", (-1,), "of all three"),
    Tensor("peak_kv_pages", "UINT32", (-1,), "KV pages it held at once, at most; each counts for all who share it"),
    Tensor("num_host_cached_tokens", "UINT32", (-1,), "of num_cached_tokens, those loaded from host memory"),
    Tensor("num_disk_cached_tokens", "UINT32", (-1,), "likewise, from the disk"),
    Tensor("energy_j", "FP32", (-1,), "its tokens' share of the GPU's energy; absent where nothing measures that"),
    Tensor("batch_index", "UINT32", (-1,), "which prompt, from 0; always sent when the request has several"),
    Tensor("num_cancelled", "UINT32", (1,), "answers `cancel`: how many prompts were told to stop, 0 if none runs"),
)
ACCOUNT_OUTPUTS = frozenset(
    {
        "queue_time_s",
        "prefill_time_s",
        "decode_time_s",
        "total_time_s",
        "peak_kv_pages",
        "num_host_cached_tokens",
        "num_disk_cached_tokens",
        "energy_j",
    }
)
UNSWITCHED = ("text_output", "batch_index", "num_cancelled")  # outputs that no return_<name> asks for

# All optional for the server; of `text_input`, `prompts`, `input_ids` and `messages` there must be one.
INPUTS = (
    Tensor("text_input", "STRING", (1,), "the prompt"),
    # `text_input` takes one prompt only, as in the vLLM backend: perf_analyzer would want a shape for one of any size.
    Tensor("prompts", "STRING", (-1,), "several prompts (not in the vLLM backend)"),
    Tensor("input_ids", "INT32", (-1,), "the prompt as token ids, used as they are (not in the vLLM backend)"),
    Tensor("input_lengths", "INT32", (-1,), "`input_ids` are several prompts of so many ids, one after another"),
    Tensor("cancel", "BOOL", (1,), "no prompt: end the requests that have this one's id; default false"),
    Tensor("messages", "STRING", (1,), "JSON list of chat messages, for the model's chat template"),
    Tensor("tools", "STRING", (1,), "JSON list of tools, for the chat template"),
    Tensor("add_generation_prompt", "BOOL", (1,), "whether the chat template begins the answer; default true"),
    Tensor("chat_template_kwargs", "STRING", (1,), "JSON object of the chat template's variables"),
    Tensor("stream", "BOOL", (1,), "a response per step instead of one at the end; default false"),
    Tensor("sampling_parameters", "STRING", (1,), "JSON object of sampling parameters; numbers may be strings"),
    Tensor("stop", "STRING", (-1,), "stop strings (a list cannot be an HTTP parameter; not in the vLLM backend)"),
    # A list cannot be an HTTP parameter; TensorRT-LLM's clients, LiteLLM among them, send these, [""] for none.
    Tensor("stop_words", "STRING", (-1,), 'stop strings under another name; "" is none (not in the vLLM backend)'),
    Tensor("bad_words", "STRING", (-1,), 'texts that never appear; "" is none (not in the vLLM backend)'),
    Tensor("exclude_input_in_output", "BOOL", (1,), "default: true for streams, else false: the prompt comes first"),
    *(
        Tensor(f"return_{t.name}", "BOOL", (1,), f"send {t.name}; default false")
        for t in OUTPUTS
        if t.name not in UNSWITCHED
    ),
)
VLLM_DIMS = {"num_input_tokens": (1,)}  # where its config.pbtxt may differ: it takes one prompt a request
INPUT_NAMES = frozenset(tensor.name for tensor in INPUTS)


def read_inputs(request: Any) -> Arrays:
    """The inputs of a request of the server. Raises: InvalidRequest, the table does not have them."""
    tensors = {tensor.name(): tensor for tensor in request.inputs()}
    if unknown := tensors.keys() - INPUT_NAMES:  # a config.pbtxt of another backend may declare more
        raise InvalidRequest(f"{', '.join(sorted(unknown))}: not implemented; expected no such input")
    return {name: tensor.as_numpy() for name, tensor in tensors.items()}


def complete_config(config: Any) -> None:
    """Fill in what a model configuration leaves out (the server's `ModelConfig`, for auto_complete_config).

    Raises:
        ValueError: the configuration contradicts the table.
    """
    given = config.as_dict()
    declared = {entry["name"] for entry in given.get("input", ())}  # which may be required: the vLLM backend's are
    for tensor in INPUTS:
        config.add_input(_entry(tensor) if tensor.name in declared else {**_entry(tensor), "optional": True})
    with_dims = {(entry["name"], *entry["dims"]) for entry in given.get("output", ())}
    for tensor in OUTPUTS:
        if (tensor.name, *VLLM_DIMS.get(tensor.name, ())) not in with_dims:
            config.add_output(_entry(tensor))
    if "model_transaction_policy" not in given:  # false is a choice: no streams, but the /infer endpoints
        config.set_model_transaction_policy({"decoupled": True})
    config.set_max_batch_size(0)


def _entry(tensor: Tensor) -> dict[str, Any]:
    return {"name": tensor.name, "data_type": f"TYPE_{tensor.type}", "dims": list(tensor.dims)}
