"""Where overlap pays and where not: steady batches against sequential, in turns, on the GPU that is here.

    python benchmarks/overlap.py ablation --model benchmarks/models/llama-3-8b --profile profile.json --output a.json
    python benchmarks/overlap.py sensitivity --model benchmarks/models/llama-3-8b --profile profile.json --output s.json
    python benchmarks/overlap_plot.py a.json --output a.svg

`ablation` (the paper's Fig. 9): two halves one after the other ("nano-batch only"), attention of one half on SMs of its
own beside the rest of the other ("overlap memory": halves.py), and the plan of a schedule file ("searched"), on batches
of four workloads. `sensitivity`: the plan that is predicted to take least, of two nano-batches with attention on SMs of
its own, over the tokens of a batch and the mean context of its decodes, with prompts twice as long as outputs. No more
tokens decode than the GPU's memory has KV for; the others are of prompts.

What is planned follows from a profile of the GPU (`nanoflow-search --until profile`). The cells of `sensitivity` are
first all planned and predicted, which needs no GPU. The same command where one is times the plans of the file, of all
cells or of those that --tokens and --context name.

All arms run the engine's kernels on the same weights, pages and requests. The file is written after every cell, and
what is in it is neither planned nor timed again.
"""

from __future__ import annotations

import argparse
import gc
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean

import msgspec
from cells import Cell, Record, fill
from halves import nano_batch_only, overlap_memory
from nanoflow_search.cost.batch_sizes import checked, mix_of, natural_tokens
from nanoflow_search.cost.model import ModelSize, Workload
from nanoflow_search.cost.work import Mix
from nanoflow_search.emit.trials import STUDENT, Round, Timer, mean_timing, time_round
from nanoflow_search.hardware.plan_timer import PlanTimer
from nanoflow_search.plan.partitions import best_by_grid, partitions_of
from nanoflow_search.predict.predict import predict
from nanoflow_search.predict.timing_model import Measured
from nanoflow_search.profile.data import Profile, ProfileError
from paired import compared, described

from nanoflow_backend.config.model_config import ModelConfig
from nanoflow_backend.graph.model import Model
from nanoflow_backend.models.hugging_face import read_model_config
from nanoflow_backend.models.model import build
from nanoflow_backend.runtime.device import Device, find_device
from nanoflow_backend.schedule.file import ScheduleFile, fingerprint
from nanoflow_backend.schedule.plan import Schedule
from nanoflow_backend.schedule.presets import sequential
from nanoflow_backend.schedule.validate import validate

BATCHES = ("512/2:2048", "512/512:2048", "1024/512:2048", "512/1024:1536")  # sizes whose halves fill waves of tiles
TOKENS = (512, 1024, 1536, 2048, 3072, 4096)
CONTEXTS = (512, 1024, 2048, 4096, 8192)
PROMPT_TO_OUTPUT = 2
WARM_S = 0.35  # before a run is measured: the GPU is hot from the one before, and only its clock must follow


@dataclass(frozen=True)
class Bench:
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
        mix, facts = self._batch(Workload.parse(workload), tokens)
        halves = overlap_memory(self.model.layer, Measured(self.profile, mix), self.layers)
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
            found = compared(self._timer(mix, missing.values()), sequential(self.model.layer, tokens), missing, rounds)
            arms |= {name: details.get(name, {}) | entry for name, entry in found.items()}
        return {**facts, "arms": arms, "untimed": {name: why for name, why in untimed.items() if name not in arms}}

    def plan(self, context: int, tokens: int) -> Cell:
        """The plan that is predicted to take least, be it less than sequential or more; nothing is timed."""
        mix, facts = self._batch(_around(context), tokens)
        graph, measured = self.model.layer, Measured(self.profile, mix)
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
            "sequential": described(mean_timing([turn.before, turn.after])),
            "overlapped": described(overlapped),
            "over_sequential": round(math.exp(turn.log_gain), 4),
            "pairs": [round(gain, 5) for gain in pairs(turn)],
            "error": round(planned["predicted"]["plan_us"] / overlapped.layer_us - 1, 4),
        }

    def _batch(self, workload: Workload, tokens: int) -> tuple[Mix, Cell]:
        natural = natural_tokens(ModelSize.of(self.config), self.profile.header.device, 1, workload)
        mix = mix_of(workload, tokens, natural)
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


def _around(context: int) -> Workload:
    output = context / (PROMPT_TO_OUTPUT + 0.5)  # on average a decode has its prompt and half of its output
    return Workload(PROMPT_TO_OUTPUT * output, output)


def pairs(turn: Round) -> tuple[float, float]:
    return turn.before.layer_us / turn.first.layer_us, turn.after.layer_us / turn.second.layer_us


def margin(cells: Sequence[Cell]) -> float:
    """Half of the 95 % interval of one cell's gain, relative: by how the pairs of a cell differ, pooled over all."""
    variance = mean(math.log(one / other) ** 2 / 2 for one, other in (cell["pairs"] for cell in cells))
    return STUDENT[min(len(cells), len(STUDENT)) - 1] * math.sqrt(variance / 2)


def margin_of_timed(cells: Sequence[Cell]) -> Cell:
    timed = [cell for cell in cells if "pairs" in cell]
    return {"margin_95": round(margin(timed), 5)} if timed else {}


def told(cell: Cell) -> str:
    gains = [f"{name} {arm['over_sequential'][0]:.3f}x" for name, arm in cell["arms"].items()]
    return ", ".join(gains + [f"{name}: {why}" for name, why in cell["untimed"].items()])


def parse_batch(text: str) -> Cell:
    """Read "1024/512:2048". Raises: ValueError."""
    workload, _, tokens = text.partition(":")
    Workload.parse(workload)
    if not tokens.isdecimal():
        raise ValueError(f"batch: expected PROMPT/OUTPUT:TOKENS such as {BATCHES[0]}, got {text!r}")
    (size,) = checked([int(tokens)])
    return {"workload": workload, "tokens": size}


def load(paths: Sequence[Path], model: Model, profile: Profile) -> dict[str, ScheduleFile]:
    """Raises: ScheduleError, a file for another model or device."""
    files = {path.name: ScheduleFile.load(path) for path in paths}
    for file in files.values():
        file.check_header(model, profile.header.precision, profile.header.device, 1, profile.header.device_sms)
    return files


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


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="benchmark", required=True)
    ablation = kinds.add_parser("ablation")
    ablation.add_argument("--batch", action="append", help=f"repeatable; default: {' '.join(BATCHES)}")
    ablation.add_argument("--schedule", type=Path, action="append", default=[], help="of the search; repeatable")
    ablation.add_argument("--rounds", type=int, choices=range(2, 22), default=3)
    sensitivity = kinds.add_parser("sensitivity")
    sensitivity.add_argument("--tokens", type=int, nargs="+", default=TOKENS, help="of a batch")
    sensitivity.add_argument("--context", type=int, nargs="+", default=CONTEXTS, help="mean, of what decodes")
    for kind, seconds in ((ablation, 0.5), (sensitivity, 0.3)):
        kind.add_argument("--model", type=Path, required=True, help="a folder with a Hugging Face config.json")
        kind.add_argument("--profile", type=Path, required=True, help="of nanoflow-search: all plans follow from it")
        kind.add_argument("--layers", type=int, help="default: the model's; with fewer, ramps weigh more")
        kind.add_argument("--seconds", type=float, default=seconds, help="that are measured, a run")
        kind.add_argument("--output", type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    asked = arguments()
    config = read_model_config(asked.model)
    device = find_device("cuda" if asked.benchmark == "ablation" else "auto")
    profile = load_profile(asked.profile, build(config), device)
    layers = asked.layers or config.num_layers

    def timer_of(mix: Mix) -> Timer:
        return PlanTimer.here(config, mix, num_layers=layers, seconds=asked.seconds, warm_s=WARM_S)

    bench = Bench(config, profile, layers, timer_of)
    facts = {
        "benchmark": asked.benchmark,
        "model": asked.model.name,
        "device": profile.header.device,
        "profile": profile.hash(),
        "layers": layers,
        "seconds": asked.seconds,
    }
    if asked.benchmark == "ablation":
        files = load(asked.schedule, bench.model, profile)
        fill(
            Record(asked.output, facts),
            [parse_batch(text) for text in asked.batch or BATCHES],
            lambda key, known: bench.ablate(**key, files=files, rounds=asked.rounds, known=known),
            told,
        )
        return
    record = Record(asked.output, facts, margin_of_timed)
    keys = [{"context": context, "tokens": tokens} for context in asked.context for tokens in checked(asked.tokens)]
    fill(
        record,
        keys,
        lambda key, known: known or bench.plan(**key),
        lambda cell: f"predicted {cell['predicted']['gain']:.3f}x",
    )
    if device.kind == "cpu":
        print("predicted; the same command where a GPU is times the plans", flush=True)
        return
    fill(
        record,
        keys,
        lambda _, planned: planned if "over_sequential" in planned else bench.time(planned),
        lambda cell: f"{cell['over_sequential']:.3f}x, predicted {cell['predicted']['gain']:.3f}x",
    )


if __name__ == "__main__":
    main()
