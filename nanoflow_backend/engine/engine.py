"""Engine: scheduler and workers joined into one loop; and `generate`, the way to use it from Python."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from nanoflow_backend.config import ConfigError, EngineConfig, ModelConfig
from nanoflow_backend.engine.auto_schedule import find_auto_schedule
from nanoflow_backend.engine.completion import Completion, Job, Progress, complete, stream
from nanoflow_backend.engine.ranks import Ranks
from nanoflow_backend.engine.worker import Launched, Worker
from nanoflow_backend.models.model import build
from nanoflow_backend.request.request import Request
from nanoflow_backend.request.sampling_params import InvalidRequest, SamplingParams
from nanoflow_backend.runtime.device import find_device, show_only
from nanoflow_backend.sampling.constraints import Constraints, Masks
from nanoflow_backend.sampling.grammar import Grammar, Grammars
from nanoflow_backend.schedule.source import named_dense_batch_tokens
from nanoflow_backend.scheduler.batch import Batch, Delta, FinishReason, Sampled
from nanoflow_backend.scheduler.limits import SchedulerLimits
from nanoflow_backend.scheduler.scheduler import Scheduler
from nanoflow_backend.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)
COMPILATION_POLL_S = 0.01  # while there is nothing else to do


class Engine:
    """Call `step` until `has_work` is false; or let `generate` do it.

    Args:
        config: see EngineConfig.
        on_rank_death: told from another thread that a tensor-parallel rank is gone.
    """

    def __init__(self, config: EngineConfig, on_rank_death: Callable[[str], None] = log.error) -> None:
        if config.gpus is not None:
            show_only(config.gpus)
        device = find_device(config.device)
        config = find_auto_schedule(config, device)
        config = replace(config, dense_batch_tokens=named_dense_batch_tokens(config))
        self.config = config = config.settle(device.kind)
        self.model_config = ModelConfig.from_pretrained(Path(config.model))
        self.max_model_tokens = _max_model_tokens(config, self.model_config)
        build(self.model_config, config.tensor_parallel)  # says what the ranks cannot share, before any of them starts
        self.ranks = Ranks(config, self.max_model_tokens, on_rank_death) if config.tensor_parallel > 1 else None
        try:
            self.worker = Worker(config, self.model_config, self.max_model_tokens)
            if self.ranks:
                self.ranks.wait_until_ready()
        except Exception:
            self.close()
            raise
        limits = SchedulerLimits(
            dense_batch_tokens=config.dense_batch_tokens,
            chunk_tokens=config.chunk_tokens,
            prompt_tokens=config.prompt_tokens,
            max_running=config.max_running,
            max_queue_size=config.max_queue_size,
            num_pages=self.worker.num_pages,
            page_tokens=config.page_tokens,
            max_model_tokens=self.max_model_tokens,
        )
        self.scheduler = Scheduler(
            limits,
            eos_token_ids=self.model_config.eos_token_ids,
            prefix_caching=config.prefix_caching,
            priority_aging_s=config.priority_aging_s,
            seed=config.seed,
        )
        model = self.model_config
        grammars = Grammars(lambda: self.tokenizer, model.vocab_size, model.eos_token_ids)
        self.constraints = Constraints(model.vocab_size, model.eos_token_ids, grammars)
        self._compiling: dict[int, Future[Grammar]] = {}  # by request id; they are held meanwhile
        self._refused: list[tuple[int, InvalidRequest]] = []
        self.in_flight: Launched | None = None
        self.last_batch: Batch | None = None  # of the last step; None: it launched nothing

    @classmethod
    def from_pretrained(cls, model: str | Path, **config: Any) -> Engine:
        """The engine for a Hugging Face folder; `config` are fields of EngineConfig.

        Raises:
            ConfigError: naming what is wrong in the folder or the fields.
        """
        return cls(EngineConfig.resolve({"model": str(model), **config}, relative_to=Path.cwd()))

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or self.in_flight is not None

    @property
    def description(self) -> str:
        """One line for people: what runs here, and how."""
        shape, config = self.model_config, self.config
        paced = f", {config.prompt_tokens} of prompts" if config.prompt_tokens < config.dense_batch_tokens else ""
        return (
            f"{shape.architecture}, {shape.num_layers} layers, hidden {shape.hidden_size}, {config.dtype}, "
            f"TP {config.tensor_parallel} on {self.worker.device.name}; schedule {config.schedule}, "
            f"B_dense {config.dense_batch_tokens}{paced}; {self.worker.num_pages} pages of {config.page_tokens} tokens"
        )

    def has_room(self, sequences: int = 1) -> bool:
        """The queue takes one more request, of so many sequences."""
        return self.scheduler.queue_room >= sequences

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """None where the folder has no tokenizer.json: such a model continues token ids."""
        folder = Path(self.config.model)
        return Tokenizer.from_pretrained(folder) if (folder / "tokenizer.json").exists() else None

    def add(self, request: Request) -> None:
        """Queue a request; one with a grammar waits until that is compiled. Raises: InvalidRequest, QueueFull."""
        params = request.params
        self._check_ids("prompt", request.prompt)
        self._check_ids("logit_bias", params.logit_bias)
        self._check_ids("allowed_token_ids", params.allowed_token_ids)
        self._check_ids("bad_words_token_ids", list(chain.from_iterable(params.bad_words_token_ids)))
        grammar = self.constraints.prepare(params)
        held = grammar is not None and not grammar.done()  # asked once: it may be done in the next moment
        if grammar is not None and not held:
            grammar.result()
        self.scheduler.add(request, held)
        if grammar is not None and held:
            self._compiling[request.id] = grammar

    def cancel(self, request_id: int, reason: FinishReason = FinishReason.CANCELLED, index: int | None = None) -> None:
        """End a request, or one of its sequences, early; the last delta of each gives the reason.

        What has ended is left alone.
        """
        if index is None:
            self._compiling.pop(request_id, None)
        self.scheduler.cancel(request_id, reason, index)

    def refused(self) -> list[tuple[int, InvalidRequest]]:
        """Requests that `add` took and that turned out to be invalid since the last call: grammars, once compiled.

        Their last deltas, which say "cancelled", are handed over by a later step.
        """
        refused, self._refused = self._refused, []
        return refused

    def cancel_all(self) -> None:
        """End every request; `step` reports it."""
        for request_id in self.scheduler.live_ids:
            self.cancel(request_id)

    def step(self) -> list[Delta]:
        """Launch one batch, then collect the one before it: EOS is seen one step late (paper section 4.2.1).

        Raises:
            RuntimeError: there is work, but nothing that could run.
        """
        if self._compiling:
            self._release_compiled()
        batch = self.scheduler.schedule()
        if batch and self.ranks:
            self.ranks.broadcast(batch)
        launched = self.worker.launch_forward(batch) if batch else None
        self.last_batch = batch
        results = self._collect(self.in_flight) if self.in_flight else None
        deltas = self.scheduler.retire(results)
        if launched:
            self.worker.launch_tail(launched, self._masks(launched.batch))
        self.in_flight = launched
        if launched and not self.config.async_scheduling:
            deltas += self.scheduler.retire(self._collect(launched))
            self.in_flight = None
        if not (batch or results or deltas) and self.scheduler.has_work:
            if not self._compiling:  # as after a step that was interrupted
                raise RuntimeError(f"there is work, and nothing can run: {self.scheduler.stats}")
            wait(self._compiling.values(), COMPILATION_POLL_S, FIRST_COMPLETED)
        return deltas

    def stream(self, jobs: Iterable[Job | None]) -> Iterator[tuple[int, Progress | InvalidRequest]]:
        """Run (prompt, params) pairs, read as the queue has room; yields (number, what is new of it).

        None among them: none for now; see `completion.stream`.
        """
        return stream(self, self.tokenizer, jobs)

    def complete(self, jobs: Iterable[Job | None]) -> Iterator[tuple[int, Completion | InvalidRequest]]:
        """Run (prompt, params) pairs, read as the queue has room; yields (number, result) in order of ending."""
        return complete(self, self.tokenizer, jobs)

    def generate(
        self, prompts: Sequence[str | list[int]], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Completion]:
        """Complete `prompts` (texts or token ids), each with its own `params` or all with the same.

        Completions come in order of the prompts, `params.n` for each of them.

        Raises:
            InvalidRequest: a prompt or parameter that cannot be served, with its number; the others are cancelled.
        """
        if isinstance(prompts, str) or any(isinstance(prompt, int) for prompt in prompts):
            raise InvalidRequest("prompts: expected a list of texts or of lists of token ids, got a single prompt")
        params = SamplingParams() if params is None else params
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
        if len(each) != len(prompts):
            raise InvalidRequest(f"params: expected one, or one for each of {len(prompts)} prompts; got {len(each)}")
        results: dict[tuple[int, int], Completion] = {}
        for number, result in self.complete(zip(prompts, each, strict=True)):
            if isinstance(result, InvalidRequest):
                raise InvalidRequest(f"prompt {number}: {result}")
            results[number, result.index] = result
        return [results[key] for key in sorted(results)]

    def _check_ids(self, field: str, ids: Collection[int]) -> None:
        vocab_size = self.model_config.vocab_size
        if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
            raise InvalidRequest(f"{field}: expected token ids in 0..{vocab_size - 1}, got {min(ids)}..{max(ids)}")

    def _release_compiled(self) -> None:
        """Let those requests in whose grammars are compiled now, and refuse those that have none."""
        for request_id, grammar in list(self._compiling.items()):
            if not grammar.done():
                continue
            del self._compiling[request_id]
            error = grammar.exception()
            if error is None:
                self.scheduler.release(request_id)
            elif isinstance(error, InvalidRequest):
                self._refuse(request_id, error)
            else:
                raise error

    def _refuse(self, request_id: int, error: InvalidRequest) -> None:
        self._refused.append((request_id, error))
        self.scheduler.cancel(request_id)

    def _collect(self, launched: Launched) -> Sampled:
        sampled = self.worker.collect(launched)
        if self.constraints:
            self.constraints.observe(launched.batch.sampled_slots, sampled.token_ids)
        return sampled

    def _masks(self, batch: Batch) -> Masks | None:
        """What the rows of a batch may sample, now that the step before has come back."""
        self.constraints.admit(batch.admitted)
        if not self.constraints:
            return None
        slots = batch.sampled_slots
        masks = self.constraints.masks(slots)
        if masks is None:
            return None
        if self.ranks:
            self.ranks.broadcast(masks)
        for slot, why in self.constraints.broken(slots).items():
            self._refuse(self.scheduler.id_at(slot), InvalidRequest(f"structured_outputs: cannot go on: {why}"))
        return masks

    def close(self) -> None:
        if self.ranks:
            self.ranks.close()


def _max_model_tokens(config: EngineConfig, model: ModelConfig) -> int:
    if config.max_model_tokens is None:
        return model.max_model_tokens
    if config.max_model_tokens > model.max_model_tokens:
        raise ConfigError(
            f"max_model_tokens: expected at most {model.max_model_tokens} (the model's max_position_embeddings), "
            f"got {config.max_model_tokens}"
        )
    return config.max_model_tokens
