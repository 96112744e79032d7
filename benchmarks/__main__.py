"""This is the one command line of all benchmarks; a module is imported when its command runs, so --help is quick."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import NamedTuple

import typer


class Command(NamedTuple):
    name: str
    module: str  # of this package; its main(), whose docstring is the command's help
    measures: str  # the line of --help


ROOMS = {
    "kernels": (
        Command("kernels", "kernels.kernels", "Time, power and energy of each kernel alone (GPU)."),
        Command("energy", "kernels.energy", "Joules of products and attention, and against the clock (GPU)."),
        Command("collectives", "kernels.collectives", "Our collectives beside a plain copy, ranks on one GPU (GPU)."),
        Command("sm-placement", "kernels.sm_placement", "Which SMs a lane should have (GPU)."),
    ),
    "engine": (
        Command("loop-cpu", "engine.loop_cpu", "CPU time of the engine's thread a step, no device."),
        Command("scheduler-cpu", "engine.scheduler_cpu", "CPU time of the scheduler a step."),
        Command("admission", "engine.admission", "Steps and preemptions by way of admission, simulated."),
        Command("multi-round", "engine.multi_round", "What host memory is worth to conversations, simulated."),
        Command("tier-cost", "engine.tier_cost", "What storing pages costs when nothing comes back (GPU)."),
        Command("disk-pages", "engine.disk_pages", "Bytes a second of the disk tier's store, alone."),
    ),
    "overlap": (
        Command("overlap-ablation", "overlap.ablation", "What cutting costs, overlap wins, the search adds (GPU)."),
        Command("overlap-sensitivity", "overlap.sensitivity", "Over which batches overlap pays (GPU)."),
        Command("emulated-tp", "overlap.emulated_tp", "Tensor parallelism predicted by one rank alone (GPU)."),
        Command("tensor-parallel", "overlap.tensor_parallel", "Plans for 70B on 2, 4 and 8 GPUs, predicted."),
        Command("overlap-picture", "overlap.picture", "A picture of either result."),
    ),
    "serving": (
        Command("serving-overhead", "serving.overhead", "gRPC streams against the engine alone."),
        Command("serving-offline", "serving.offline", "An offline workload through tritonserver."),
        Command("streaming", "serving.streaming", "What a streamed response costs, no device."),
        Command("scrape", "serving.scrape", "How fresh the metrics page is, and what that costs, no device."),
        Command("rolling-update", "serving.rolling_update", "Three servers are replaced under load, no device."),
    ),
    "cluster": (Command("ray-batch", "cluster.ray_batch", "Batches on a Ray cluster: overhead, kills, memory."),),
    "peers": (
        Command("vllm", "peers.vllm", "The offline workload on vLLM (GPU)."),
        Command("beside-vllm", "peers.beside_vllm", "Our engine and vLLM on one card, with their ratio (GPU)."),
        Command("vllm-online", "peers.vllm_online", "The open loop of arrivals on vLLM (GPU)."),
        Command("flashinfer", "peers.flashinfer", "FlashInfer's attention beside ours (GPU)."),
    ),
    "hosts": (Command("hosts", "hosts.two_hosts", "One engine on two hosts: tokens, lost links, restarts."),),
    "stress": (
        Command("fuzz", "stress.fuzz", "Whether any request breaks the server."),
        Command("soak", "stress.soak", "Whether anything leaks or gets lost at twice the capacity."),
        Command("bursts", "stress.bursts", "Whether the server outlives bursts of streams."),
        Command("overload", "stress.overload", "What becomes of requests that are too many."),
        Command("lifecycle", "stress.lifecycle", "What loads and unloads of a model leave behind."),
        Command(
            "tier-soak", "stress.tier_soak", "Whether kills of an engine with host memory and disk change an answer."
        ),
        Command("mutate", "stress.mutated_files", "Whether any file of a model breaks the start."),
        Command("sanitizer-traffic", "stress.sanitizer_traffic", "Random traffic for a sanitizer."),
    ),
    "accuracy": (
        Command("parity", "accuracy.parity", "Greedy tokens and logits against transformers."),
        Command("held-out-loss", "accuracy.held_out_loss", "What FP8 costs: the demo model's loss on unseen text."),
        Command("chat-templates", "accuracy.chat_templates", "Chat templates of a folder against transformers."),
    ),
    "paper": (
        Command("search-a100", "paper.search_a100", "The search on the paper's published tables."),
        Command("search-optimality", "paper.optimality", "Both stages of the search against exhaustion."),
    ),
    "tables": (Command("results-table", "tables.results_table", "Write docs/results.md and the README's table."),),
}

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)


def add(command: Command, room: str) -> None:
    """Register a command whose options, --help included, are left to its own function."""

    def run(context: typer.Context) -> None:
        of_module = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        of_module.command()(import_module(f"benchmarks.{command.module}").main)
        of_module(args=context.args, prog_name=context.command_path)

    untouched = {"allow_extra_args": True, "ignore_unknown_options": True}
    app.command(
        command.name,
        help=command.measures,
        rich_help_panel=room,
        add_help_option=False,
        context_settings=untouched,
    )(run)


for room, commands in ROOMS.items():
    for command in commands:
        add(command, room)


def main() -> None:
    """Errors that name their cause need no traceback."""
    from nanoflow_backend.embedded.server import ServerError

    try:
        app(prog_name="python -m benchmarks")
    except (ValueError, ServerError) as error:  # ConfigError, ScheduleError and ProfileError are of the first kind
        sys.exit(f"benchmarks: {error}")


if __name__ == "__main__":
    main()
