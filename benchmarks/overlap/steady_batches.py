"""Steady batches of a model are planned, predicted, and timed against sequential on the GPU of a profile.

What is planned follows from the profile. No more tokens decode than the GPU's memory has KV for; the others are of
prompts. All arms run the engine's kernels on the same weights, pages and requests.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
from nanoflow_search.cost.batch_sizes import batch_mix, natural_tokens
from nanoflow_search.cost.model import ModelSize
from nanoflow_search.cost.workload import MeanWorkload, Mix
from nanoflow_search.emit.statistics import Round, mean_timing
from nanoflow_search.emit.timed_schedules import compare, rounded
from nanoflow_search.emit.trials import time_round
from nanoflow_search.hardware.plan_timer import PlanTimer
from nanoflow_search.plan.partitions import best_by_grid, partitions_of
from nanoflow_search.predict.predict import Timer, predict
from nanoflow_search.predict.timing_model import TimingModel
from nanoflow_search.profile.data import Profile
from nanoflow_search.profile.load import ProfileError

from benchmarks.overlap.halves import nano_batch_only, overlap_memory
from benchmarks.resumable import Cell
from nanoflow_backend.config.model_config import ModelConfig
from nanoflow_backend.config.quantization import AT_LOAD, FP8
from nanoflow_backend.graph.model import Model
from nanoflow_backend.models.hugging_face import read_model_config
from nanoflow_backend.models.model import build
from nanoflow_backend.runtime.device import Device, find_device
from nanoflow_backend.schedule.file import ScheduleFile, fingerprint
from nanoflow_backend.schedule.plan import Schedule
from nanoflow_backend.schedule.presets import sequential
from nanoflow_backend.schedule.validate import validate

PROMPT_TO_OUTPUT = 2  # in a map by mean contexts
WARM_S = 0.35  # before a run is measured: the GPU is hot from the one before, and only its clock must follow


@dataclass(frozen=True)
class SteadyBatches:
    """Batches of a model on the GPU of a profile; `timer_of` makes a Timer for those of a mix."""

    config: ModelConfig
    profile: Profile
    layers: int
    timer_of: Callable[[Mix], Timer]

    @cached_property
    def model(self) -> Model:
        return build(self.config)

    def ablate(
        self, workload: str, tokens: int, files: Mapping[str, ScheduleFile], rounds: int, known: Cell | None
    ) -> Cell:
        """What is `known` of the cell, and the arms that it lacks."""
        mix, facts = self._batch(MeanWorkload.parse(workload), tokens)
        halves = overlap_memory(self.model.layer, TimingModel(self.profile, mix), self.layers)
        plans = {"nano-batch only": nano_batch_only(self.model.layer, halves), "overlap memory": halves}
        details, untimed = {"overlap memory": {"attention_sms": halves.partition["memory"]}}, {}
        try:
            name, plans["searched"] = self._searched(workload, mix, files)
            details["searched"] = {"schedule": name}
        except LookupError as reason:
            untimed["searched"] = str(reason)
        arms = dict(known["arms"]) if known else {}
        if "searched" in plans and arms.get("searched", {}).get("schedule") != name:
            arms.pop("searched", None)
        if missing := {name: plan for name, plan in plans.items() if name not in arms}:
            found = compare(self._timer(mix, missing.values()), sequential(self.model.layer, tokens), missing, rounds)
            arms |= {name: details.get(name, {}) | entry for name, entry in found.items()}
        return {**facts, "arms": arms, "untimed": {name: why for name, why in untimed.items() if name not in arms}}

    def plan(self, context: int, tokens: int) -> Cell:
        """The plan that is predicted to take least, be it less than sequential or more; nothing is timed."""
        mix, facts = self._batch(_around(context), tokens)
        graph, measured = self.model.layer, TimingModel(self.profile, mix)
        plan = best_by_grid(graph, measured, self.layers)
        plan_us, sequential_us = (predict(p, measured, self.layers).layer_us for p in (plan, sequential(graph, tokens)))
        return {
            **facts,
            "attention_sms": plan.partition["memory"],
            "first_half": {"tokens": plan.groups[0].stop, "decodes": plan.groups[0].decodes},
            "predicted": {
                "sequential_us": round(sequential_us, 2),
                "plan_us": round(plan_us, 2),
                "gain": round(sequential_us / plan_us, 4),
            },
            "plan": msgspec.to_builtins(plan),
        }

    def time(self, planned: Cell) -> Cell:
        """One round A B B A of a cell's plan. `pairs`: the gains of A B and of B A; `error`: of the predicted time."""
        mix, _ = self._batch(_around(planned["context"]), planned["tokens"])
        plan = msgspec.convert(planned["plan"], Schedule)
        (turn,) = time_round(self._timer(mix, [plan]), sequential(self.model.layer, plan.tokens), [plan])
        overlapped = mean_timing([turn.first, turn.second])
        return {
            **planned,
            "sequential": rounded(mean_timing([turn.before, turn.after])),
            "overlapped": rounded(overlapped),
            "over_sequential": round(math.exp(turn.log_gain), 4),
            "pairs": [round(gain, 5) for gain in pairs(turn)],
            "error": round(planned["predicted"]["plan_us"] / overlapped.layer_us - 1, 4),
        }

    def _batch(self, workload: MeanWorkload, tokens: int) -> tuple[Mix, Cell]:
        header = self.profile.header
        natural = natural_tokens(ModelSize.of(self.config, header.precision), header.device, 1, workload)
        mix = batch_mix(workload, tokens, natural)
        facts = {
            "decode_tokens": round(mix.decode_tokens),
            "decode_context": mix.decode_context,
            "prefill_context": mix.prefill_context,
            "memory_full": tokens > natural,
        }
        return mix, facts

    def _searched(self, workload: str, mix: Mix, files: Mapping[str, ScheduleFile]) -> tuple[str, Schedule]:
        """The plan that such batches run under. Raises: LookupError, why there is none to time."""
        tokens, read = round(mix.tokens), round(mix.decode_tokens * mix.decode_context)
        about = {name: file for name, file in files.items() if workload in file.header.workloads}
        if not about:
            raise LookupError("no schedule file for this workload")
        for name, file in about.items():
            for number, plan in enumerate(file.plans):
                if plan.tokens != tokens or not plan.holds(tokens, read):
                    continue
                if plan.launches == sequential(self.model.layer, tokens).launches:
                    raise LookupError(f"{name}: sequential is its plan")
                return f"{name}:{number}", plan
        raise LookupError(f"{', '.join(about)}: no plan for batches of {tokens} tokens")

    def _timer(self, mix: Mix, plans: Iterable[Schedule]) -> Timer:
        for plan in plans:
            validate(plan, self.model.layer, self.layers, self.profile.header.device_sms)
        gc.collect()  # the timer before: its weights and pages leave the GPU before the next ones come
        return self.timer_of(mix)


def _around(context: int) -> MeanWorkload:
    output = context / (PROMPT_TO_OUTPUT + 0.5)  # on average a decode has its prompt and half of its output
    return MeanWorkload(PROMPT_TO_OUTPUT * output, output)


def pairs(turn: Round) -> tuple[float, float]:
    return turn.before.layer_us / turn.first.layer_us, turn.after.layer_us / turn.second.layer_us


def profiled_config(model: Path, profile: Path) -> ModelConfig:
    """The model of a folder as it was profiled: in FP8, if its layer is then that of the profile."""
    header = Profile.load(profile).header
    plain = msgspec.structs.replace(read_model_config(model), scaled_kv=header.precision.kv == FP8)
    quantised = msgspec.structs.replace(plain, quantization=plain.quantization or AT_LOAD)
    return quantised if fingerprint(build(quantised).layer) == header.model_fingerprint else plain


def load_profile(path: Path, model: Model, device: Device) -> Profile:
    """Raises: ProfileError, of another model or GPU than the one here, or without SMs of attention's own."""
    profile = Profile.load(path)
    if profile.header.model_fingerprint != fingerprint(model.layer):
        raise ProfileError(f"{path}: the profile is of another model")
    taken, here = f"{profile.header.device} ({profile.header.device_sms} SMs)", f"{device.name} ({device.sms} SMs)"
    if device.kind == "cuda" and taken != here:
        raise ProfileError(f"{path}: the profile is of a {taken}, and the GPU here is a {here}")
    if not partitions_of(profile, model.layer):
        raise ProfileError(f"{path}: attention and products were not measured on SMs of their own")
    return profile


def steady_batches(
    model: Path, profile: Path, *, device: str, layers: int | None, duration_s: float
) -> tuple[SteadyBatches, Device]:
    """The batches of a model folder by a profile's file, and the device that is here.

    Args:
        device: "cuda", or "auto" where batches may be planned without a GPU.
        layers: by default the model's.
        duration_s: that is measured, a run.

    Raises:
        ProfileError: the profile is of another model or GPU.
    """
    config = profiled_config(model, profile)
    here = find_device(device)
    taken = load_profile(profile, build(config), here)
    num_layers = layers or config.num_layers

    def timer_of(mix: Mix) -> Timer:
        precision = taken.header.precision
        return PlanTimer.here(
            config, mix, num_layers=num_layers, precision=precision, seconds=duration_s, warm_s=WARM_S
        )

    return SteadyBatches(config, taken, num_layers, timer_of), here


def facts_of(batches: SteadyBatches, model: Path, benchmark: str, duration_s: float) -> dict[str, Any]:
    """What a result file says of all its cells."""
    return {
        "benchmark": benchmark,
        "model": model.name,
        "device": batches.profile.header.device,
        "profile": batches.profile.hash(),
        "layers": batches.layers,
        "seconds": duration_s,
    }
