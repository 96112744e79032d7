"""Profile a model's layer on the GPU that is here; a run that was cut goes on from its file.

    python benchmarks/take_profile.py --model benchmarks/models/llama-3-8b --workload 512/1024 --profile profile.json

At most 175 points of about 2 seconds: operations alone over tokens, SMs and clocks, and attention beside all else.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from nanoflow_search.cost_model import Workload
from nanoflow_search.gpu import GpuDevice
from nanoflow_search.loads import loads_of, partition_loads_of
from nanoflow_search.profile import held_out
from nanoflow_search.profiler import header_of, take_profile

from nanoflow_backend.config import ModelConfig
from nanoflow_backend.models.model import build


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a folder with a Hugging Face config.json")
    parser.add_argument("--workload", default="512/1024", help="mean tokens of prompts/outputs: contexts of attention")
    parser.add_argument("--tokens", type=int, default=2048, help="of the batch that attention is measured up to")
    parser.add_argument("--shared", action="store_true", help="for plans whose lanes share SMs; default: partitions")
    parser.add_argument("--largest-tokens", type=int, default=4096, help="that products are measured up to, if shared")
    parser.add_argument("--seconds", type=float, default=1.0, help="that are measured, a point")
    parser.add_argument("--profile", type=Path, required=True)
    arguments = parser.parse_args()
    config = ModelConfig.from_pretrained(arguments.model)
    graph, mix = build(config).layer, Workload.parse(arguments.workload).steady_mix(arguments.tokens)
    device = GpuDevice.here(config, mix, seconds=arguments.seconds)
    if arguments.shared:
        loads = loads_of(graph, device.sms, mix, arguments.largest_tokens)
    else:
        loads = partition_loads_of(graph, device.sms, mix, arguments.tokens)
    begun = time.monotonic()
    profile = take_profile(
        device,
        header_of(device, graph),
        loads.alone,
        loads.together,
        arguments.profile,
        lambda line: print(f"{time.monotonic() - begun:6.1f} s  {line}", flush=True),
    )
    print(
        f"{len(profile.points)} points, {len(profile.pairs)} pairs, {profile.header.static_w:.0f} W static; held out:"
    )
    print(held_out(profile))


if __name__ == "__main__":
    main()
