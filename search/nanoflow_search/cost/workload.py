"""A workload says how long requests are on average; a mix says what one batch of them holds.

Source: NanoFlow, section 3 (p and d are the mean tokens of a request's prompt and output).
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Mix:
    """What a batch holds: some tokens that decode and some tokens of prompts, each kind with a mean context."""

    decode_tokens: float
    prefill_tokens: float
    decode_context: float  # tokens that a decoding token attends to
    prefill_context: float  # tokens that a prompt's token attends to

    @property
    def tokens(self) -> float:
        """All tokens of the batch."""
        return self.decode_tokens + self.prefill_tokens


@dataclass(frozen=True)
class MeanWorkload:
    """The mean tokens of a request: p of its prompt, d of its output."""

    prompt_tokens: float
    output_tokens: float

    @classmethod
    def parse(cls, text: str) -> MeanWorkload:
        """Read "1024/512".

        Raises:
            ValueError: the text is no pair of positive numbers; the message says what was expected.
        """
        prompt, _, output = text.partition("/")
        if not (prompt.isdecimal() and output.isdecimal() and int(prompt) and int(output)):
            raise ValueError(f"workload: expected PROMPT/OUTPUT tokens such as 1024/512, got {text!r}")
        return cls(int(prompt), int(output))

    @property
    def decode_share(self) -> float:
        """d / (p + d): the share of an iteration's tokens that decode in the steady state."""
        return self.output_tokens / (self.prompt_tokens + self.output_tokens)

    @property
    def context_tokens(self) -> float:
        """p + d/2: the mean tokens that a decoding request holds over its life."""
        return self.prompt_tokens + self.output_tokens / 2

    def mix(self, dense_batch_tokens: float) -> Mix:
        """Return the mix as the paper's estimates count it: every token of a prompt attends to the whole prompt."""
        decode = dense_batch_tokens * self.decode_share
        return Mix(decode, dense_batch_tokens - decode, self.context_tokens, self.prompt_tokens)

    def steady_mix(self, dense_batch_tokens: float) -> Mix:
        """Return the mix as the engine's kernels see it: attention is causal, so that a prompt's tokens attend to half
        of the prompt on average."""
        return replace(self.mix(dense_batch_tokens), prefill_context=self.prompt_tokens / 2)


def ramp_mix(workload: MeanWorkload, steady: Mix, share: float) -> Mix:
    """Return the mix of a batch while an engine that was empty fills up: `share` (0 to 1) of its requests run already.

    The batch has as many tokens as the `steady` one: prompts take the place of the decodes that are still to come.
    Requests began at an even rate and none has ended, so that they are through half of `share` of their output on
    average.
    """
    decodes = share * steady.decode_tokens
    context = workload.prompt_tokens + share * workload.output_tokens / 2
    return Mix(decodes, steady.tokens - decodes, context, steady.prefill_context)
