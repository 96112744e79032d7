"""SchedulerLimits are the sizes that a scheduler must keep to, checked once when they are made."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class SchedulerLimits:
    """How much one step, the queue and the KV cache hold.

    Raises:
        ValueError: a limit with which no request could ever run; the message names it.
    """

    dense_batch_tokens: int  # of one step, decodes and prompts together
    chunk_tokens: int  # of one request's prompt in one step
    prompt_tokens: int  # of all prompts in one step
    max_running: int  # requests with a slot
    max_queue_size: int  # sequences that may wait
    num_pages: int  # of the KV cache
    page_tokens: int
    max_model_tokens: int  # prompt and output of one request
    inter_token_target_s: float | None = None  # how long a step with decodes may take; None: as long as it has tokens

    def __post_init__(self) -> None:
        for name in ("chunk_tokens", "prompt_tokens", "max_running", "max_queue_size", "num_pages", "page_tokens"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if self.max_model_tokens < 2:
            raise ValueError(f"max_model_tokens: expected a prompt token and another, got {self.max_model_tokens}")
        if self.dense_batch_tokens < self.max_running:
            raise ValueError(
                f"dense_batch_tokens: expected at least max_running ({self.max_running}), got {self.dense_batch_tokens}"
            )

    @property
    def cache_tokens(self) -> int:
        """Tokens whose keys and values the KV cache holds at once."""
        return self.num_pages * self.page_tokens
