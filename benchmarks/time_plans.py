"""Time schedules against sequential on the GPU that is here, in a steady state; with a profile, predict them first.

    python benchmarks/time_plans.py --model benchmarks/models/llama-3-8b --workload 512/1024 --tokens 2048 \\
        --schedule plan.json --schedule nano-batched-2 --profile profile.json --output timed.json

Each round runs sequential, plan, plan, sequential (A B B A). Results are written after every plan, and a plan that is
in the file is not timed again. With --share the batch is that of an engine that fills up, of whose requests only this
share runs yet: so the `least_decode_kv_tokens` of a plan, from which on it wins, are found by measurement.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from cells import Cell, Record, fill
from nanoflow_search.cost.batch_sizes import mix_of, natural_tokens
from nanoflow_search.cost.model import ModelSize, Workload
from nanoflow_search.emit.threshold import ramping
from nanoflow_search.hardware.plan_timer import PlanTimer
from nanoflow_search.predict.predict import predict
from nanoflow_search.predict.timing_model import Measured
from nanoflow_search.profile.data import Profile
from paired import compared, described

from nanoflow_backend.graph.model import Model
from nanoflow_backend.models.hugging_face import read_model_config
from nanoflow_backend.models.model import build
from nanoflow_backend.runtime.device import find_device
from nanoflow_backend.schedule.file import ScheduleFile
from nanoflow_backend.schedule.plan import Schedule
from nanoflow_backend.schedule.presets import nano_batched, sequential
from nanoflow_backend.schedule.validate import validate


def schedules(names: list[str], model: Model, tokens: int) -> dict[str, Schedule]:
    """Presets, and of schedule files all plans for `tokens` but sequential ones."""
    found, base = {}, sequential(model.layer, tokens)
    for name in names:
        if name.startswith("nano-batched-"):
            found[name] = nano_batched(model.layer, tokens, int(name.removeprefix("nano-batched-")))
            continue
        plans = ScheduleFile.load(Path(name)).plans
        found |= {
            f"{Path(name).name}:{i}": plan for i, plan in enumerate(plans) if plan.tokens == tokens and plan != base
        }
        if tokens not in [plan.tokens for plan in plans]:
            raise ValueError(f"{name}: has plans for {[plan.tokens for plan in plans]} tokens, none for {tokens}")
    for schedule in found.values():
        validate(schedule, model.layer, model.num_layers)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a folder with a Hugging Face config.json")
    parser.add_argument("--workload", default="512/1024", help="mean tokens of prompts/outputs")
    parser.add_argument("--tokens", type=int, default=2048, help="of the batch")
    parser.add_argument("--share", type=float, default=1.0, help="of the steady state's requests, from 0 to 1")
    parser.add_argument("--schedule", action="append", default=[], help="a file, or nano-batched-N; repeatable")
    parser.add_argument("--profile", type=Path, help="to predict with")
    parser.add_argument("--layers", type=int, help="default: the model's")
    parser.add_argument("--rounds", type=int, choices=range(2, 22), default=3)
    parser.add_argument("--seconds", type=float, default=1.0, help="that are measured, a run")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    config = read_model_config(arguments.model)
    model, workload = build(config), Workload.parse(arguments.workload)
    natural = natural_tokens(ModelSize.of(config), find_device("cuda").name, 1, workload)
    mix = ramping(workload, mix_of(workload, arguments.tokens, natural), arguments.share)
    layers = arguments.layers or model.num_layers
    measured = Measured(Profile.load(arguments.profile), mix) if arguments.profile else None
    plans = schedules(arguments.schedule, model, arguments.tokens)
    base = sequential(model.layer, arguments.tokens)
    predictions = {
        name: predict(plan, measured, layers) for name, plan in {"sequential": base, **plans}.items() if measured
    }
    for name, timing in predictions.items():
        print(f"predicted {name}: {described(timing)}", flush=True)

    facts = {
        "model": arguments.model.name,
        "workload": arguments.workload,
        "tokens": arguments.tokens,
        "share": arguments.share,
        "decode_kv_tokens": round(mix.decode_tokens * mix.decode_context),
        "layers": layers,
    }
    record = Record(arguments.output, facts, lambda _: beside)
    timer = PlanTimer.here(config, mix, num_layers=layers, seconds=arguments.seconds)
    alone = timer(base)
    print(f"measured sequential: {described(alone)}", flush=True)
    beside = {
        "sequential_predicted": described(predictions["sequential"]) if predictions else None,
        "sequential": described(alone),
    }

    def measure(key: Cell, known: Cell | None) -> Cell:
        if known:
            return known
        name = key["schedule"]
        entry = compared(timer, base, {name: plans[name]}, arguments.rounds)[name]
        if predicted := predictions.get(name):
            error = predicted.layer_us / entry["measured"]["layer_us"] - 1
            entry |= {"predicted": described(predicted), "error": round(error, 4)}
        return entry

    fill(record, [{"schedule": name} for name in plans], measure, json.dumps)


if __name__ == "__main__":
    main()
