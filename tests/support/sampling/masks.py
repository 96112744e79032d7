"""What constraints let through, as sets of token ids."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np

from nanoflow_backend.request.sampling_params import SamplingParams
from nanoflow_backend.sampling.constraints import Constraints, Masks
from nanoflow_backend.sampling.grammar import Grammars
from nanoflow_backend.text.tokenizer import Tokenizer

PADDING = 5  # ids of the model that the tokenizer does not have


def make(tokenizer: Tokenizer | None, vocab_size: int | None = None) -> Constraints:
    assert tokenizer is None or tokenizer.eos_id is not None
    size = vocab_size or (tokenizer.vocab_size + PADDING if tokenizer else 100)
    ends = (tokenizer.eos_id,) if tokenizer and tokenizer.eos_id is not None else ()
    return Constraints(size, ends, Grammars(lambda: tokenizer, size, ends))


def params(**fields: Any) -> SamplingParams:
    return SamplingParams.parse(fields)


def ids(masks: Masks | None) -> list[set[int]]:
    assert masks is not None
    masks = msgspec.msgpack.decode(msgspec.msgpack.encode(masks), type=Masks)  # as ranks get it
    flags = np.unpackbits(masks.allowed.view(np.uint8), axis=1, bitorder="little")
    return [set(np.flatnonzero(row).tolist()) for row in flags]
