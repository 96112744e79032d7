"""The tensors of the model: one table, from which config.pbtxt, auto-completion, parsing and responses derive.

Names and meanings are those of Triton's vLLM backend, so that its clients work unchanged; what is new here says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec
from numpy.typing import NDArray

Arrays = Mapping[str, NDArray[Any]]  # tensors by name; strings are objects: bytes


class Tensor(msgspec.Struct, frozen=True):
    name: str
    type: Literal["STRING", "BOOL", "INT32", "UINT32", "FP32"]
    dims: tuple[int, ...]
    meaning: str


# Where `n` sequences were asked for, outputs of a sequence have `n` elements, in every response.
# Every output but `text_output` is sent where the client sets the input `return_<name>`, or where it names the outputs
# that it wants and they are not simply all (a request that names none, as every HTTP one, asks for all).
OUTPUTS = (
    Tensor("text_output", "STRING", (-1,), "the new text; all of it, after the prompt, when not streaming"),
    Tensor("finish_reason", "STRING", (-1,), '"None" before the end; then "stop", "length" or "cancelled"'),
    Tensor("cumulative_logprob", "FP32", (-1,), "sum of the log-probabilities of all output tokens so far"),
    Tensor("logprobs", "STRING", (-1,), 'JSON per new token: {id: {"logprob", "rank", "decoded_token"}}; or "null"'),
    Tensor("num_input_tokens", "UINT32", (1,), "tokens of the prompt"),
    Tensor("num_output_tokens", "UINT32", (-1,), "new tokens in this response"),
    # Not in the vLLM backend. Over HTTP the server itself can lose responses of a fast stream and say nothing: a stream
    # is whole if a response with `total_output_tokens` came and the `num_output_tokens` of all responses add up to it.
    Tensor("total_output_tokens", "UINT32", (1,), "all output tokens; in the last response only"),
    # Of several sequences one after the other: `num_output_tokens` says where each one's end.
    Tensor("output_ids", "INT32", (-1,), "ids of the new tokens; always sent when the prompt came as ids"),
    Tensor("prompt_logprobs", "STRING", (1,), "as logprobs, per prompt token, null for the first; in one response"),
    Tensor("stop_reason", "STRING", (-1,), 'the stop string or stop token id that ended the output, else "None"'),
    Tensor("num_cached_tokens", "UINT32", (1,), "prompt tokens that were in the prefix cache"),
)

# All optional for the server; of `text_input`, `input_ids` and `messages` there must be one.
INPUTS = (
    Tensor("text_input", "STRING", (1,), "the prompt"),
    Tensor("input_ids", "INT32", (-1,), "the prompt as token ids, used as they are (not in the vLLM backend)"),
    Tensor("messages", "STRING", (1,), "JSON list of chat messages, for the model's chat template"),
    Tensor("tools", "STRING", (1,), "JSON list of tools, for the chat template"),
    Tensor("add_generation_prompt", "BOOL", (1,), "whether the chat template begins the answer; default true"),
    Tensor("chat_template_kwargs", "STRING", (1,), "JSON object of further variables for the chat template"),
    Tensor("stream", "BOOL", (1,), "a response per step instead of one at the end; default false"),
    Tensor("sampling_parameters", "STRING", (1,), "JSON object of sampling parameters; numbers may be strings"),
    Tensor("stop", "STRING", (-1,), "stop strings (a list cannot be an HTTP parameter; not in the vLLM backend)"),
    Tensor("exclude_input_in_output", "BOOL", (1,), "default: true for streams, else false: the prompt comes first"),
    *(Tensor(f"return_{t.name}", "BOOL", (1,), f"send {t.name}; default false") for t in OUTPUTS[1:]),
)


def complete(config: Any) -> None:
    """Fill in what a model configuration leaves out (the server's `ModelConfig`, for auto_complete_config).

    Raises:
        ValueError: the configuration contradicts the table, or is not decoupled.
    """
    for tensor in INPUTS:
        config.add_input({**_entry(tensor), "optional": True})
    for tensor in OUTPUTS:
        config.add_output(_entry(tensor))
    config.set_model_transaction_policy({"decoupled": True})
    config.set_max_batch_size(0)


def _entry(tensor: Tensor) -> dict[str, Any]:
    return {"name": tensor.name, "data_type": f"TYPE_{tensor.type}", "dims": list(tensor.dims)}
