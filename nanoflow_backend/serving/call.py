"""Call is what a client asks for, understood: prompt ids and SamplingParams, out of tensors and request parameters."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import msgspec
import numpy as np

from nanoflow_backend.request import exact_json
from nanoflow_backend.request.sampling_params import InvalidRequest, SamplingParams
from nanoflow_backend.scheduler.batch import FinishReason
from nanoflow_backend.scheduler.sequence_factory import check_can_run
from nanoflow_backend.scheduler.waiting_queue import check_can_wait
from nanoflow_backend.serving.inputs import Inputs
from nanoflow_backend.serving.limits import Limits
from nanoflow_backend.serving.tensors import OUTPUTS, Arrays
from nanoflow_backend.text.bad_words import encode_bad_words
from nanoflow_backend.text.tokenizer import Tokenizer

ALL_OUTPUTS = frozenset(tensor.name for tensor in OUTPUTS)
PROMPTS = ("text_input", "prompts", "input_ids", "messages")
SEVERAL = ("prompts", "input_lengths")  # an element for each prompt

# Request parameters that belong to the server or to what stands before it, not to sampling: the client's request id
# (curl users' "id" arrives as a parameter too), headers that the server was told to forward, and protocol switches.
RESERVED = frozenset({"id", "headers", "binary_data_output", "traceparent", "tracestate", "authorization"})
RESERVED_PREFIXES = ("triton_", "sequence_", "x-", "grpc-")


class Call(msgspec.Struct, frozen=True, kw_only=True):
    """What a client asks for one prompt; `batch_index` is its place where the request may have several.

    `params` is what the engine runs; it may have logprobs that the client does not see (`show_logprobs` false) but
    whose sum it wants, and bad words are tokens there. Timeouts of 0 are no limit. `shown_prompt` goes before the first
    text.
    """

    prompt: list[int]
    params: SamplingParams
    stream: bool
    shown_prompt: str
    outputs: frozenset[str]
    show_logprobs: bool
    priority: int = 0
    timeout_us: int = 0
    batch_index: int | None = None
    queue_timeout_us: int = 0

    @classmethod
    def parse(
        cls,
        tensors: Arrays,
        parameters: Mapping[str, Any],
        requested: Collection[str],
        tokenizer: Tokenizer | None,
        limits: Limits,
    ) -> list[Call]:
        """Understand a request: a call for each of its prompts.

        Args:
            tensors: the inputs that were sent, as the table declares them; strings are bytes objects.
            parameters: the request's own parameters: sampling parameters, `priority`, `timeout` and `queue_timeout`
                (microseconds).
            requested: names of the outputs that the client wants; all of them where it names none.
            limits: what the model takes, and the most that its answer may be. The sizes of `tensors` are checked
                already.

        Raises:
            InvalidRequest: the message names the field and what was expected.
        """
        inputs = Inputs(tensors)
        fields = _fields(inputs, parameters)
        # Of the request, not of sampling. Clients put them here too: gRPC has no other way for a priority.
        priority = _integer(fields, "priority", -(2**31), 2**31 - 1)
        timeout_us, queue_timeout_us = _timeouts(fields, limits.max_queue_us)
        params = SamplingParams.parse(fields)
        _check_stop(params.stop, tokenizer)
        num_prompts = max((inputs.flat(name).size for name in SEVERAL if name in inputs), default=1)
        check_can_wait(num_prompts, num_prompts * params.n, limits.max_queue_size)  # before any text becomes tokens
        params = encode_bad_words(params, tokenizer)
        prompts = _prompts(inputs, tokenizer, limits, num_prompts)
        is_batch = any(name in inputs for name in SEVERAL)
        stream = inputs.flag("stream") or False
        exclude = inputs.flag("exclude_input_in_output")
        outputs = _outputs(inputs, requested, tokenizer, is_batch)
        shown = [_shown_prompt(exclude, stream, text) for _, text in prompts]
        shown_bytes = sum(len(text.encode()) for text in shown)
        limits.check_answer(params, [len(ids) for ids, _ in prompts], shown_bytes, len(outputs) if stream else 0)
        return [
            cls(
                prompt=prompt,
                params=_with_logprobs(params) if "cumulative_logprob" in outputs else params,
                stream=stream,
                shown_prompt=shown[index],
                outputs=outputs,
                show_logprobs=params.logprobs is not None,
                priority=priority,
                timeout_us=timeout_us,
                queue_timeout_us=queue_timeout_us,
                batch_index=index if is_batch else None,
            )
            for index, (prompt, _) in enumerate(prompts)
        ]


def own_parameters(text: str, timeout_us: int) -> dict[str, Any]:
    """A request's own parameters, of the JSON that the server gives, and its timeout, if it has one."""
    return {**json.loads(text), **({"timeout": timeout_us} if timeout_us else {})}


def first_timeout(tensors: Arrays, own: Mapping[str, Any], max_queue_us: int = 0) -> tuple[int, FinishReason] | None:
    """When a request that never begins is over: microseconds after it came, and why. None: it has no limit.

    The arguments, and what is raised, are as those of `Call.parse`.
    """
    reasons = (FinishReason.DEADLINE, FinishReason.QUEUE_TIMEOUT)
    limits = zip(_timeouts(_fields(Inputs(tensors), own), max_queue_us), reasons, strict=True)
    return min(((us, reason) for us, reason in limits if us), default=None)


def _fields(inputs: Inputs, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """What the request says of its sampling, and of itself, wherever it says it."""
    sampling = "sampling_parameters" in inputs
    return _merge(
        ("sampling_parameters", inputs.json("sampling_parameters", dict, exact_json.loads) if sampling else {}),
        ("the request's parameters", {name: v for name, v in parameters.items() if not _is_reserved(name)}),
        ("the input stop", {"stop": inputs.texts("stop")} if "stop" in inputs else {}),
        ("the input stop_words", _words(inputs, "stop_words", "stop")),
        ("the input bad_words", _words(inputs, "bad_words", "bad_words")),
    )


def _timeouts(fields: dict[str, Any], max_queue_us: int) -> tuple[int, int]:
    """Take (timeout, queue_timeout) out of `fields`, in microseconds; 0 is no limit."""
    timeout_us = _integer(fields, "timeout", 0, 2**63 - 1)
    queue_timeout_us = _integer(fields, "queue_timeout", 0, 2**63 - 1)
    return timeout_us, min(queue_timeout_us or max_queue_us, max_queue_us or queue_timeout_us)


def _is_reserved(name: str) -> bool:
    return name.lower() in RESERVED or name.lower().startswith(RESERVED_PREFIXES)


def _integer(fields: dict[str, Any], name: str, low: int, high: int) -> int:
    """Take a parameter of the request (not of sampling) out of `fields`; 0 where there is none."""
    value = fields.pop(name, None)
    if value is None:
        return 0
    try:
        number = msgspec.convert(value, int, strict=False)
    except msgspec.ValidationError:
        number = low - 1
    if not low <= number <= high:
        raise InvalidRequest(f"{name}: expected an integer in {low}..{high}, got {value!r}")
    return number


def _check_stop(stop: tuple[str, ...], tokenizer: Tokenizer | None) -> None:
    if tokenizer is None and stop:
        raise InvalidRequest("stop: expected none, for the model has no tokenizer.json (use stop_token_ids)")
    try:
        "".join(stop).encode()
    except UnicodeEncodeError as error:  # JSON can spell a lone surrogate
        raise InvalidRequest(f"stop: expected valid Unicode text: {error}") from None


def _merge(*sources: tuple[str, Mapping[str, Any]]) -> dict[str, Any]:
    """One mapping of all sources; a name may come twice only with the same value ("5" is 5, a stop string a list)."""
    merged: dict[str, tuple[str, Any]] = {}
    for source, fields in sources:
        for name, value in fields.items():
            first, other = merged.setdefault(name, (source, value))
            if _spelling(value) != _spelling(other):
                raise InvalidRequest(f"{name}: {other!r} in {first}, but {value!r} in {source}")
    return {name: value for name, (_, value) in merged.items()}


def _spelling(value: Any) -> str:
    return str(value[0] if isinstance(value, list) and len(value) == 1 else value)


def _prompts(
    inputs: Inputs, tokenizer: Tokenizer | None, limits: Limits, num_prompts: int
) -> list[tuple[list[int], str | None]]:
    """(ids, text) of each prompt; no text where the ids came as such. None is read after one that cannot run."""
    name = _prompt_input(inputs)
    prompts = []
    for index, (ids, text) in enumerate(_read(name, inputs, tokenizer, limits)):
        place = f" in prompt {index}" if num_prompts > 1 else ""
        if not ids:
            raise InvalidRequest(f"{name}: expected at least one token, got none{place}")
        check_can_run(len(ids), limits.max_model_tokens, limits.cache_tokens, place)
        prompts.append((ids, text))
    if not prompts:
        raise InvalidRequest(f"{name}: expected at least one prompt, got none")
    return prompts


def _prompt_input(inputs: Inputs) -> str:
    """The one input that has the prompts."""
    given = [name for name in PROMPTS if name in inputs]
    if len(given) != 1:
        raise InvalidRequest(f"{', '.join(PROMPTS)}: expected one of them, got {' and '.join(given) or 'none'}")
    (name,) = given
    if name != "messages":
        _refuse_chat_inputs(inputs)
    if "input_lengths" in inputs and name != "input_ids":
        raise InvalidRequest(f"input_lengths: expected input_ids with them, got {name}")
    return name


def _read(
    name: str, inputs: Inputs, tokenizer: Tokenizer | None, limits: Limits
) -> Iterator[tuple[list[int], str | None]]:
    """The prompts in the input `name`, each tokenised when it is its turn."""
    if name == "input_ids":
        yield from ((ids, None) for ids in _ids(inputs, limits.vocab_size))
    elif tokenizer is None:
        raise InvalidRequest(f"{name}: expected none, for the model has no tokenizer.json (use input_ids)")
    elif name == "messages":
        text = _chat(inputs, tokenizer)
        limits.check_chat(text)
        yield tokenizer.encode(text, add_special_tokens=False), None
    else:
        for text in inputs.texts(name) if name == "prompts" else [inputs.text(name)]:
            yield tokenizer.encode(text), text


def _ids(inputs: Inputs, vocab_size: int) -> list[list[int]]:
    """The prompts in `input_ids`: one, or those of `input_lengths`."""
    ids = inputs.flat("input_ids")
    if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
        raise InvalidRequest(f"input_ids: expected ids in 0..{vocab_size - 1}, got {ids.min()}..{ids.max()}")
    if "input_lengths" not in inputs:
        return [ids.tolist()]
    lengths = inputs.flat("input_lengths").astype(np.int64)
    if (lengths < 1).any() or lengths.sum() != ids.size:
        shown = lengths[:8].tolist() + ["..."] * (lengths.size > 8)
        raise InvalidRequest(f"input_lengths: expected lengths >= 1 with a sum of {ids.size} (input_ids), got {shown}")
    return [prompt.tolist() for prompt in np.split(ids, lengths.cumsum()[:-1])]


def _refuse_chat_inputs(inputs: Inputs) -> None:
    for name in ("tools", "add_generation_prompt", "chat_template_kwargs"):
        if name in inputs:
            raise InvalidRequest(f"{name}: expected it with messages only")


def _chat(inputs: Inputs, tokenizer: Tokenizer) -> str:
    """The text of a conversation, by the model's chat template."""
    return tokenizer.apply_chat_template(
        inputs.json("messages", list),
        inputs.json("tools", list) if "tools" in inputs else None,
        inputs.flag("add_generation_prompt"),
        inputs.json("chat_template_kwargs", dict) if "chat_template_kwargs" in inputs else {},
    )


def _shown_prompt(exclude: bool | None, stream: bool, text: str | None) -> str:
    if exclude is False and stream:
        raise InvalidRequest("exclude_input_in_output: expected true, or nothing, when streaming")
    if exclude is False and text is None:
        raise InvalidRequest("exclude_input_in_output: expected true, or nothing, with input_ids or messages")
    return "" if exclude or stream or text is None else text


def _outputs(inputs: Inputs, requested: Collection[str], tokenizer: Tokenizer | None, is_batch: bool) -> frozenset[str]:
    """Which outputs to send; the comment at `OUTPUTS` has the rule."""
    chosen = frozenset(requested) if frozenset(requested) != ALL_OUTPUTS else frozenset()
    if tokenizer is None and "text_output" in chosen:
        raise InvalidRequest("text_output: expected not to be requested, for the model has no tokenizer.json")
    wanted = chosen | {name for name in ALL_OUTPUTS if inputs.flag(f"return_{name}")}
    if not chosen and tokenizer is not None:
        wanted |= {"text_output"}
    if not chosen and "input_ids" in inputs:
        wanted |= {"output_ids"}
    if not chosen and is_batch:
        wanted |= {"batch_index", "num_output_tokens"} if "output_ids" in wanted else {"batch_index"}
    return wanted & frozenset(requested)


def _words(inputs: Inputs, name: str, field: str) -> dict[str, str | list[str]]:
    """A sampling field from an input that some clients always send, with empty texts where they mean none."""
    words = [text for text in inputs.texts(name) if text] if name in inputs else []
    return {field: words[0] if len(words) == 1 else words} if words else {}


def _with_logprobs(params: SamplingParams) -> SamplingParams:
    return params if params.logprobs is not None else msgspec.structs.replace(params, logprobs=0)
