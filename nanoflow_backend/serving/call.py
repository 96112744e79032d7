"""Call: what a client asks for, understood. Tensors and request parameters in; prompt ids and SamplingParams out."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

import msgspec

from nanoflow_backend.engine.tokenizer import Tokenizer
from nanoflow_backend.scheduler.sampling_params import InvalidRequest, SamplingParams
from nanoflow_backend.serving.tensors import OUTPUTS, Arrays

ALL_OUTPUTS = frozenset(tensor.name for tensor in OUTPUTS)

# Request parameters that belong to the server or to what stands before it, not to sampling: the client's request id
# (curl users' "id" arrives as a parameter too), headers that the server was told to forward, and protocol switches.
RESERVED = frozenset({"id", "headers", "binary_data_output", "traceparent", "tracestate", "authorization"})
RESERVED_PREFIXES = ("triton_", "sequence_", "x-", "grpc-")


class Call(msgspec.Struct, frozen=True, kw_only=True):
    """One request of a client.

    `params` is what the engine runs; it may have logprobs that the client does not see (`show_logprobs` false) but
    whose sum it wants. Timeouts of 0 are no limit. `shown_prompt` goes before the first text.
    """

    prompt: list[int]
    params: SamplingParams
    stream: bool
    shown_prompt: str
    outputs: frozenset[str]
    show_logprobs: bool
    priority: int = 0
    timeout_us: int = 0
    queue_timeout_us: int = 0

    @classmethod
    def parse(
        cls,
        tensors: Arrays,
        parameters: Mapping[str, Any],
        requested: Collection[str],
        tokenizer: Tokenizer | None,
        vocab_size: int,
        max_queue_us: int = 0,
    ) -> Call:
        """Understand a request.

        Args:
            tensors: the inputs that were sent, as the table declares them; strings are bytes objects.
            parameters: the request's own parameters: sampling parameters, `priority`, `timeout` and `queue_timeout`
                (microseconds).
            requested: names of the outputs that the client wants; all of them where it names none.
            vocab_size: of the model; ids of `input_ids` are below it.
            max_queue_us: no request may wait longer, whatever it says; 0 is no limit.

        Raises:
            InvalidRequest: the message names the field and what was expected.
        """
        fields = _merge(
            ("sampling_parameters", _json_object(tensors)),
            ("the request's parameters", {name: v for name, v in parameters.items() if not _is_reserved(name)}),
            ("the input stop", {"stop": _texts(tensors, "stop")} if "stop" in tensors else {}),
        )
        # Of the request, not of sampling. Clients put them here too: gRPC has no other way for a priority.
        priority = _integer(fields, "priority", -(2**31), 2**31 - 1)
        timeout_us = _integer(fields, "timeout", 0, 2**63 - 1)
        queue_timeout_us = _integer(fields, "queue_timeout", 0, 2**63 - 1)
        queue_timeout_us = min(queue_timeout_us or max_queue_us, max_queue_us or queue_timeout_us)
        params = SamplingParams.parse(fields)
        _check_stop(params.stop, tokenizer)
        prompt, text = _prompt(tensors, tokenizer, vocab_size)
        stream = _flag(tensors, "stream") or False
        outputs = _outputs(tensors, requested, tokenizer)
        return cls(
            prompt=prompt,
            params=_with_logprobs(params) if "cumulative_logprob" in outputs else params,
            stream=stream,
            shown_prompt=_shown_prompt(_flag(tensors, "exclude_input_in_output"), stream, text),
            outputs=outputs,
            show_logprobs=params.logprobs is not None,
            priority=priority,
            timeout_us=timeout_us,
            queue_timeout_us=queue_timeout_us,
        )


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


def _json_object(tensors: Arrays) -> dict[str, Any]:
    if "sampling_parameters" not in tensors:
        return {}
    text = _text(tensors, "sampling_parameters")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"sampling_parameters: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise InvalidRequest(f"sampling_parameters: expected a JSON object, got {text[:80]}")
    return value


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


def _prompt(tensors: Arrays, tokenizer: Tokenizer | None, vocab_size: int) -> tuple[list[int], str | None]:
    """(ids, text); no text where the ids came as such."""
    if ("text_input" in tensors) == ("input_ids" in tensors):
        both = "both" if "text_input" in tensors else "neither"
        raise InvalidRequest(f"text_input, input_ids: expected one of them, got {both}")
    if "input_ids" in tensors:
        ids = tensors["input_ids"]
        if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
            raise InvalidRequest(f"input_ids: expected ids in 0..{vocab_size - 1}, got {ids.min()}..{ids.max()}")
        prompt, text = ids.ravel().tolist(), None
    elif tokenizer is None:
        raise InvalidRequest("text_input: expected none, for the model has no tokenizer.json (use input_ids)")
    else:
        text = _text(tensors, "text_input")
        prompt = tokenizer.encode(text)
    if not prompt:
        raise InvalidRequest(f"{'input_ids' if text is None else 'text_input'}: expected at least one token, got none")
    return prompt, text


def _shown_prompt(exclude: bool | None, stream: bool, text: str | None) -> str:
    if exclude is False and stream:
        raise InvalidRequest("exclude_input_in_output: expected true, or nothing, when streaming")
    if exclude is False and text is None:
        raise InvalidRequest("exclude_input_in_output: expected true, or nothing, with input_ids")
    return "" if exclude or stream or text is None else text


def _outputs(tensors: Arrays, requested: Collection[str], tokenizer: Tokenizer | None) -> frozenset[str]:
    """Which outputs to send; the comment at `OUTPUTS` has the rule."""
    chosen = frozenset(requested) if frozenset(requested) != ALL_OUTPUTS else frozenset()
    if tokenizer is None and "text_output" in chosen:
        raise InvalidRequest("text_output: expected not to be requested, for the model has no tokenizer.json")
    wanted = chosen | {name for name in ALL_OUTPUTS if _flag(tensors, f"return_{name}")}
    if not chosen and tokenizer is not None:
        wanted |= {"text_output"}
    if not chosen and "input_ids" in tensors:
        wanted |= {"output_ids"}
    return wanted & frozenset(requested)


def _with_logprobs(params: SamplingParams) -> SamplingParams:
    return params if params.logprobs is not None else msgspec.structs.replace(params, logprobs=0)


def _flag(tensors: Arrays, name: str) -> bool | None:
    return bool(_only(tensors, name)) if name in tensors else None


def _text(tensors: Arrays, name: str) -> str:
    _only(tensors, name)
    return _texts(tensors, name)[0]


def _only(tensors: Arrays, name: str) -> Any:
    if tensors[name].size != 1:
        raise InvalidRequest(f"{name}: expected one element, got shape {list(tensors[name].shape)}")
    return tensors[name].flat[0]


def _texts(tensors: Arrays, name: str) -> list[str]:
    try:
        return [item if isinstance(item, str) else item.decode() for item in tensors[name].ravel().tolist()]
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{name}: expected UTF-8 text: {error}") from None
