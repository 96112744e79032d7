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

from nanoflow_backend.request.internal_error import INTERRUPTIONS, InternalError, RequestError
from nanoflow_backend.request.invalid_request import InvalidRequest
from nanoflow_backend.request.structured_outputs import StructuredOutputs
from nanoflow_backend.sampling.json_schema import OPTIONS, enforceable
from nanoflow_backend.sampling.lark import with_enforceable_schemas
from nanoflow_backend.text.tokenizer import Tokenizer

CACHED_GRAMMARS = 256
LONGEST_ERROR = 500  # characters: the library repeats parts of the grammar
NOTHING_LEFT = "the grammar leaves no token of the model"
COPYING = "copying a grammar"


class Grammar:
    """Where one output is in its grammar."""

    def __init__(self, matcher: Any, failure: RequestError | None = None) -> None:
        """`failure`: why there is no matcher, or none that works."""
        self.matcher = matcher
        self._failure = failure

    def fresh(self) -> Grammar:
        """The same at its start."""
        return Grammar(self.matcher.deep_copy())

    def advance(self, token: int) -> None:
        """The output goes on with this token. After its end, or an error, whatever comes is ignored."""
        if self._failure is None:
            try:
                self.matcher.consume_token(token)
            except BaseException as error:  # a panic in the library is no Exception
                self._failure = InternalError.of(error, "following a grammar")

    def fail(self, failure: RequestError) -> None:
        """It is not to be asked again."""
        self._failure = self._failure or failure

    @property
    def failure(self) -> RequestError | None:
        """Why it cannot go on: a limit of the library, or a fault of it."""
        if self._failure is None and self.matcher.is_error():
            why = self.matcher.get_error()[:LONGEST_ERROR]
            self._failure = InvalidRequest(f"structured_outputs: cannot go on: {why}")
        return self._failure


class Grammars:
    """Compiles grammars for one tokenizer; keeps those that were used last."""

    def __init__(
        self, tokenizer: Callable[[], Tokenizer | None], vocab_size: int, eos_token_ids: Sequence[int]
    ) -> None:
        """`tokenizer` is called when the first grammar is compiled."""
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._num_ids = vocab_size  # with those that only the tokenizer has, once that was read
        self._eos_token_ids = [token for token in eos_token_ids if token < vocab_size]
        self._thread = ThreadPoolExecutor(1, "grammars")  # starts with the first grammar
        self._compiled: OrderedDict[StructuredOutputs, Future[Grammar]] = OrderedDict()

    def compile(self, outputs: StructuredOutputs) -> Future[Grammar]:
        """The grammar at its start, to be copied; or an InvalidRequest that names the field, or an InternalError."""
        known = self._compiled.get(outputs)
        if known is None or (known.done() and isinstance(known.exception(), InternalError)):  # that may pass
            self._compiled[outputs] = self._thread.submit(self._compile, outputs)
            if len(self._compiled) > CACHED_GRAMMARS:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(outputs)
        return self._compiled[outputs]

    def start(self, outputs: StructuredOutputs) -> Grammar:
        """A copy at its start, for one output. Its `failure` says so if that cannot be had."""
        try:
            return self.compile(outputs).result().fresh()
        except InvalidRequest as error:
            return Grammar(None, error)
        except BaseException as error:
            return Grammar(None, error if isinstance(error, InternalError) else InternalError.of(error, COPYING))

    def fill(self, grammars: Sequence[tuple[Grammar, int]], allowed: NDArray[np.int32]) -> None:
        """Write what may come next in each of these grammars to its row of `allowed` [P, words], in parallel.

        Where that fails, the grammar has a `failure`, and the row stays as it is.
        """
        able = [(grammar, row) for grammar, row in grammars if grammar.failure is None]
        if not able:
            return
        masks = np.zeros((len(able), -(-self._num_ids // 32)), np.int32)
        try:
            self._compute([grammar for grammar, _ in able], masks)
        except INTERRUPTIONS:
            raise
        except BaseException:  # of one, who knows which
            for (grammar, _), mask in zip(able, masks, strict=True):
                try:
                    self._compute([grammar], mask[None])
                except BaseException as error:
                    grammar.fail(InternalError.of(error, "finding what a grammar allows"))
        for (grammar, row), mask in zip(able, masks[:, : allowed.shape[1]], strict=True):
            mask &= allowed[row]  # the tokenizer may have ids that the model has not
            if mask.any():
                allowed[row] = mask
            else:
                grammar.fail(InvalidRequest(f"structured_outputs: cannot go on: {NOTHING_LEFT}"))

    def _compute(self, grammars: Sequence[Grammar], masks: NDArray[np.int32]) -> None:
        matchers = [(grammar.matcher, row) for row, grammar in enumerate(grammars)]
        self._executor.unsafe_compute_mask_ptr(matchers, masks.ctypes.data, 4 * masks.shape[1], len(masks))

    def _compile(self, outputs: StructuredOutputs) -> Grammar:
        try:
            return self._compile_unguarded(outputs)
        except InvalidRequest:
            raise
        except BaseException as error:
            raise InternalError.of(error, "compiling a grammar") from None

    def _compile_unguarded(self, outputs: StructuredOutputs) -> Grammar:
        library = _library()
        kind, text = _definition(outputs)
        try:
            if kind == "json":
                options: dict[str, Any] = {"whitespace_flexible": not outputs.disable_any_whitespace}
                if outputs.whitespace_pattern is not None:
                    options["whitespace_pattern"] = outputs.whitespace_pattern
                source = library.LLMatcher.grammar_from_json_schema(enforceable(text), overrides=OPTIONS | options)
            else:
                source = library.grammar_from(kind, with_enforceable_schemas(text) if kind == "grammar" else text)
            limits = library.LLParserLimits(verbose_errors=False)  # no parts of outputs in messages
            matcher = library.LLMatcher(self._tokens, source, log_level=0, limits=limits)
        except InvalidRequest:
            raise
        except ValueError as error:
            raise _invalid(outputs, str(error)) from None
        if matcher.is_error():
            raise _invalid(outputs, matcher.get_error())
        return Grammar(matcher)

    @cached_property
    def _tokens(self) -> Any:
        library, tokenizer = _library(), self._tokenizer()
        if tokenizer is None:
            raise InvalidRequest("structured_outputs: expected none, for the model has no tokenizer.json")
        if not self._eos_token_ids:
            raise InvalidRequest("structured_outputs: expected none, for no EOS token is named by model or tokenizer")
        try:
            self._num_ids = max(self._vocab_size, tokenizer.vocab_size)
            return library.LLTokenizer(tokenizer.to_json(), n_vocab=self._num_ids, eos_token=self._eos_token_ids)
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


def _invalid(outputs: StructuredOutputs, why: str) -> InvalidRequest:
    if "coerce_one_of" in why:  # an option of the library that nobody can set here
        why = "oneOf: expected alternatives that exclude each other by type, or by a required property; or use anyOf"
    return InvalidRequest(f"structured_outputs.{_field(outputs)}: {why[:LONGEST_ERROR]}")


def _field(outputs: StructuredOutputs) -> str:
    return next(kind for kind in ("json", "regex", "choice", "grammar", "json_object") if getattr(outputs, kind))


def _library() -> Any:
    """Imported when first needed: the engine runs without it."""
    try:
        import llguidance
    except ImportError:
        raise InvalidRequest("structured_outputs: expected none, for the engine's Python has no llguidance") from None
    return llguidance
