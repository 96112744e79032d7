"""Find plans whose attention has SMs of its own, from a profile alone; each goes into a schedule file of its own.

    python benchmarks/plan_partitions.py --model benchmarks/models/llama-3-8b --workload 1024/512 --tokens 2048 \\
        --profile profile.json --output plans

It needs the solver and no GPU; benchmarks/time_plans.py times the files on one.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from nanoflow_search.cost_model import Workload
from nanoflow_search.measured import Measured
from nanoflow_search.partitioned import find_partitioned
from nanoflow_search.predict import predict
from nanoflow_search.profile import Profile

from nanoflow_backend.config import ModelConfig
from nanoflow_backend.models.model import build
from nanoflow_backend.schedule.file import Header, ScheduleFile
from nanoflow_backend.schedule.presets import sequential


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a folder with a Hugging Face config.json")
    parser.add_argument("--workload", default="512/1024", help="mean tokens of prompts/outputs")
    parser.add_argument("--tokens", type=int, default=2048, help="of the batch")
    parser.add_argument("--chunk-tokens", type=int, default=256, help="that the programs cut it into")
    parser.add_argument("--step", type=int, default=128, help="tokens between cuts that the preset is tried with")
    parser.add_argument("--keep", type=int, default=5, help="so many plans")
    parser.add_argument("--profile", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True, help="a folder")
    arguments = parser.parse_args()
    model = build(ModelConfig.from_pretrained(arguments.model))
    mix = Workload.parse(arguments.workload).steady_mix(arguments.tokens)
    measured = Measured(Profile.load(arguments.profile), mix)
    base = predict(sequential(model.layer, arguments.tokens), measured, model.num_layers)
    print(f"sequential: {base.layer_us:.0f} us a layer at {base.clock_mhz:.0f} MHz", flush=True)
    found = find_partitioned(
        model.layer,
        measured,
        model.num_layers,
        arguments.chunk_tokens,
        keep=arguments.keep,
        step=arguments.step,
        progress=lambda line: print(line, flush=True),
    )
    arguments.output.mkdir(parents=True, exist_ok=True)
    for number, (schedule, timing) in enumerate(found, start=1):
        path = arguments.output / f"plan-{number}.json"
        header = Header(
            model_fingerprint=measured.profile.header.model_fingerprint,
            device=measured.profile.header.device,
            device_sms=measured.profile.header.device_sms,
            tensor_parallel=1,
            dense_batch_tokens=arguments.tokens,
            profile_hash=measured.profile.hash(),
            predicted_us=timing.layer_us,
        )
        ScheduleFile(header=header, plans=(schedule,)).save(path)
        groups = ", ".join(f"{group.decodes:.0%} of decodes up to {group.stop}" for group in schedule.groups)
        print(
            f"{path}: {timing.layer_us:.0f} us a layer at {timing.clock_mhz:.0f} MHz, "
            f"{base.layer_us / timing.layer_us:.3f}x; {schedule.partition}, {len(schedule.launches)} launches, {groups}"
        )


if __name__ == "__main__":
    main()
