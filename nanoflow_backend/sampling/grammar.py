"""Grammars compiles the form that a client asks of an output to masks of tokens, through the llguidance library.

A grammar is compiled on a thread of its own, for all requests that share it; llguidance holds no interpreter lock then,
nor while it computes masks. Its own limits bound what a grammar may take: 250,000 lexer states, 500,000 symbols, and
for one mask about 20 ms.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from nanoflow_backend.request.sampling_params import InvalidRequest
from nanoflow_backend.request.structured_outputs import StructuredOutputs
from nanoflow_backend.text.tokenizer import Tokenizer

CACHED_GRAMMARS = 256
LONGEST_ERROR = 500  # characters: the library repeats parts of the grammar


class Grammar:
    """Where one output is in its grammar."""

    def __init__(self, matcher: Any) -> None:
        self.matcher = matcher

    def fresh(self) -> Grammar:
        """The same at its start."""
        return Grammar(self.matcher.deep_copy())

    def advance(self, token: int) -> None:
        """The output goes on with this token. After its end, or an error, whatever comes is ignored."""
        self.matcher.consume_token(token)

    @property
    def error(self) -> str | None:
        """Why it cannot go on: a limit of the library."""
        return self.matcher.get_error()[:LONGEST_ERROR] if self.matcher.is_error() else None


class Grammars:
    """Compiles grammars for one tokenizer; keeps those that were used last."""

    def __init__(
        self, tokenizer: Callable[[], Tokenizer | None], vocab_size: int, eos_token_ids: Sequence[int]
    ) -> None:
        """`tokenizer` is called when the first grammar is compiled."""
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = [token for token in eos_token_ids if token < vocab_size]
        self._thread = ThreadPoolExecutor(1, "grammars")  # starts with the first grammar
        self._compiled: OrderedDict[StructuredOutputs, Future[Grammar]] = OrderedDict()

    def compile(self, outputs: StructuredOutputs) -> Future[Grammar]:
        """The grammar at its start, to be copied; or an InvalidRequest that names the field."""
        if outputs not in self._compiled:
            self._compiled[outputs] = self._thread.submit(self._compile, outputs)
            if len(self._compiled) > CACHED_GRAMMARS:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(outputs)
        return self._compiled[outputs]

    def fill(self, grammars: Sequence[tuple[Grammar, int]], allowed: NDArray[np.int32]) -> None:
        """Write what may come next in each of these grammars to its row of `allowed` [P, words], in parallel."""
        if grammars:
            matchers = [(grammar.matcher, row) for grammar, row in grammars]
            self._executor.unsafe_compute_mask_ptr(matchers, allowed.ctypes.data, 4 * allowed.shape[1], len(allowed))

    def _compile(self, outputs: StructuredOutputs) -> Grammar:
        library = _library()
        kind, text = _definition(outputs)
        try:
            if kind == "json":
                options: dict[str, Any] = {"whitespace_flexible": not outputs.disable_any_whitespace}
                if outputs.whitespace_pattern is not None:
                    options["whitespace_pattern"] = outputs.whitespace_pattern
                source = library.LLMatcher.grammar_from_json_schema(text, overrides=options)
            else:
                source = library.grammar_from(kind, text)
            limits = library.LLParserLimits(verbose_errors=False)  # no parts of outputs in messages
            matcher = library.LLMatcher(self._tokens, source, log_level=0, limits=limits)
        except ValueError as error:
            raise InvalidRequest(f"structured_outputs.{_field(outputs)}: {str(error)[:LONGEST_ERROR]}") from None
        if matcher.is_error():
            raise InvalidRequest(f"structured_outputs.{_field(outputs)}: {matcher.get_error()[:LONGEST_ERROR]}")
        return Grammar(matcher)

    @cached_property
    def _tokens(self) -> Any:
        library, tokenizer = _library(), self._tokenizer()
        if tokenizer is None:
            raise InvalidRequest("structured_outputs: expected none, for the model has no tokenizer.json")
        if not self._eos_token_ids:
            raise InvalidRequest("structured_outputs: expected none, for the model's config names no eos_token_id")
        try:
            return library.LLTokenizer(tokenizer.to_json(), n_vocab=self._vocab_size, eos_token=self._eos_token_ids)
        except ValueError as error:
            raise InvalidRequest(f"structured_outputs: expected none, with this tokenizer: {error}") from None

    @cached_property
    def _executor(self) -> Any:
        return _library().LLExecutor()


def _definition(outputs: StructuredOutputs) -> tuple[str, str]:
    """Kind and text, as `grammar_from` has them."""
    if outputs.choice is not None:
        return "choice", msgspec.json.encode(outputs.choice).decode()
    if outputs.json_object:
        return "json", '{"type": "object"}'
    kind = _field(outputs)
    return kind, getattr(outputs, kind)


def _field(outputs: StructuredOutputs) -> str:
    return next(kind for kind in ("json", "regex", "choice", "grammar", "json_object") if getattr(outputs, kind))


def _library() -> Any:
    """Imported when first needed: the engine runs without it."""
    try:
        import llguidance
    except ImportError:
        raise InvalidRequest("structured_outputs: expected none, for the engine's Python has no llguidance") from None
    return llguidance
