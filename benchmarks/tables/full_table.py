"""The full table, docs/results.md, has a row for each committed result that a line can tell, under headings."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

from benchmarks.tables.beyond_one_machine import beyond_one_machine
from benchmarks.tables.emulated import emulated
from benchmarks.tables.result_files import load, load_all, runs_beside_vllm, whole_runs_of_the_search
from benchmarks.tables.result_row import ResultRow, at_each, medians, precision, rates, requests, span, told

STEADY_S = 60.0  # a stationary part that is shorter says too little


def groups() -> dict[str, list[ResultRow]]:
    """The rows under each heading."""
    return {
        "Correctness": list(_correctness()),
        "Throughput of the engine": list(_offline()),
        "Plans and overlap": list(_overlap()),
        "Serving": list(_serving()),
        "Latency": list(_latency()),
        "The engine without a device": list(_without_device()),
        "Faults and overload": list(_faults()),
        "Beyond one machine": list(beyond_one_machine()),
        "Predictions by one rank alone (emulated, not measured on several GPUs)": list(emulated()),
    }


def _correctness() -> Iterator[ResultRow]:
    if parity := load("parity"):
        done = parity["done"]
        runs, tokens = sum(d["runs"] for d in done), sum(d["rows"] for d in done)
        worst = max(d["worst_logits_relative_rms"] for d in done)
        wrong = sum(d["different_tokens"] for d in done)
        yield ResultRow(
            f"Greedy tokens against transformers, fp32: {len(done)} of {parity['of_checkpoints']} checkpoints, "
            f"{runs // len(done)} ways to run each",
            f"{wrong} of {tokens:,} tokens differ; worst logits error {worst:.1e} relative RMS",
            parity["device"],
        )
    if chat := load("chat_templates"):
        wrong = chat["counts"]["different"] + chat["counts"]["the engine refuses"]
        yield ResultRow(
            f"{chat['templates']} chat templates against transformers, {chat['conversations']} conversations",
            f"{wrong} of {chat['pairs']:,} texts differ",
            chat["device"],
        )
    if loss := load("held_out_loss"):
        told = (f"{name} {found['nats_per_token']:.4f}" for name, found in loss["precisions"].items())
        yield ResultRow(
            f"Loss of the demo model on {loss['rows']} rows of {loss['row_tokens']} tokens that it was not trained on",
            f"nats a token: {'; '.join(told)}",
            loss["device"],
        )
    if tests := load("gpu_tests_h200"):
        yield ResultRow(
            "Tests that need a GPU: kernels, programs, engine and search against their references",
            f"{tests['passed']} of {tests['passed'] + tests['failed']} pass, in {tests['seconds']} s on 16 cores",
            tests["gpu"],
        )


def _offline() -> Iterator[ResultRow]:
    beside = [ours["date"] for ours, _ in runs_beside_vllm()]  # told with vLLM's
    for run in load_all("offline"):
        if run["date"] in beside:
            continue
        what = f"{requests(run)}, schedule {run['schedule']}"
        yield ResultRow(f"Offline, {what}: whole run", rates(run), run["gpu"])
        if isinstance(run["steady"], dict) and run["steady"]["wall_s"] >= STEADY_S:
            what = f"The same, {run['steady']['wall_s']:.0f} s of its stationary part"
            yield ResultRow(what, rates(run["steady"]), run["gpu"])
    for ours, vllm in runs_beside_vllm():
        ratio = ours["total_tokens_per_s"] / vllm["total_tokens_per_s"]
        yield ResultRow(
            f"vLLM {vllm['versions']['vllm']}, {requests(vllm)}: whole run",
            f"{rates(vllm)}; NanoFlow, on the same card: {rates(ours)} ({ratio:.2f}x)",
            vllm["gpu"],
        )
    yield from _beside_vllm()
    for turns in load_all("two_builds"):
        new, old = turns["builds"]["A"], turns["builds"]["B"]
        yield ResultRow(
            f"Build {new} against {old}, which had the same schedule, {turns['order']}: {requests(turns)}",
            f"{turns['A_over_B']:.3f}x",
            turns["gpu"],
        )


def _beside_vllm() -> Iterator[ResultRow]:
    """Results of `beside-vllm`, which have both engines and several workloads."""
    for run in load_all("beside_vllm"):
        ours, vllm = run["nanoflow"], run["vllm"][0]["versions"]["vllm"]
        for row in run["rows"]:
            yield ResultRow(
                f"vLLM {vllm}{precision(ours)}, {row['requests']:,} requests of {row['workload']}, {run['model']}: "
                "whole run",
                f"{rates(row['vllm'])}; NanoFlow, on the same card: {rates(row['nanoflow'])} ({row['ratio']:.2f}x)",
                run["gpu"],
            )


def _overlap() -> Iterator[ResultRow]:
    for searched, beside in whole_runs_of_the_search():
        prompt_tokens = searched["settings"]["prompt_tokens"]
        is_paced = prompt_tokens < searched["settings"]["dense_batch_tokens"]
        paced = f", prompts paced to {prompt_tokens} tokens a step" if is_paced else ""
        yield ResultRow(
            f"The search's plans, {requests(searched)}: whole run{paced}",
            f"{rates(searched)}; sequential, on the same card: {rates(beside)}",
            searched["gpu"],
        )
    for run in load_all("search_llama3"):
        for tokens in dict.fromkeys(trial["dense_batch_tokens"] for trial in run["trials"]):
            plain, *plans = [trial for trial in run["trials"] if trial["dense_batch_tokens"] == tokens]
            best = max(plans, key=lambda trial: trial["gain"])
            errors = sorted(abs(t["predicted_us"] / t["measured_us"] - 1) for t in (plain, *plans))
            yield ResultRow(
                f"The best plan of the search for batches of {tokens:,} tokens at {best['workload']}, {run['model']}, "
                "against sequential, in turns",
                f"{best['gain']:.3f}x (95 %: {best['gain_low']:.3f} to {best['gain_high']:.3f}), "
                f"{'chosen' if best['chosen'] else 'refused'}; {best['measured_us']:,.0f} against "
                f"{plain['measured_us']:,.0f} us a layer, {best['token_mj']:.1f} against {plain['token_mj']:.1f} "
                f"mJ/token; predictions off by at most {errors[-1]:.1%}",
                run["gpu"],
            )
    for run in load_all("overlap_ablation"):
        for cell in run["cells"]:
            arms = {name: arm["over_sequential"] for name, arm in cell["arms"].items()}
            yield ResultRow(
                f"A steady batch of {cell['tokens']:,} tokens at {cell['workload']}, {run['model']}: "
                f"{' / '.join(arms)}, against sequential",
                " / ".join(f"{gain:.3f}x ({low:.3f} to {high:.3f})" for gain, low, high in arms.values()),
                run["device"],
            )
    for run in load_all("overlap_sensitivity"):
        cells = run["cells"]
        if not (timed := [cell for cell in cells if "over_sequential" in cell]):
            continue  # predictions alone are no measurement
        margin, gains = run["margin_95"], sorted(timed, key=lambda cell: cell["over_sequential"])
        pays = sum(cell["over_sequential"] > 1 + margin for cell in timed)
        errors = [abs(cell["error"]) for cell in timed]
        yield ResultRow(
            f"Where overlap pays, by the plans predicted best from a profile, {run['model']}: {len(timed)} of "
            f"{len(cells)} steady batches of {span(cells, 'tokens')} tokens, mean contexts of {span(cells, 'context')}",
            f"faster in {pays} beyond {margin:.1%} (95 %); {told(gains[0])} to {told(gains[-1])}; "
            f"predicted times off by {median(errors):.1%} (median), at most {max(errors):.1%}",
            run["device"],
        )


def _serving() -> Iterator[ResultRow]:
    for run in load_all("served"):
        what = f"{run['clients']} gRPC clients of tritonserver, {requests(run)}, schedule {run['schedule']}"
        share = f"; {run['share_of_engine']:.1%} of the engine alone" if "share_of_engine" in run else ""
        yield ResultRow(what, rates(run) + share, run["gpu"])
    if served := load("serving"):
        yield ResultRow(
            f"{served['streams']} gRPC streams of the demo model through tritonserver against the engine alone",
            f"{served['served_tokens_per_s']:,.0f} against {served['engine_tokens_per_s']:,.0f} output tokens/s",
            served["device"],
        )
    if streaming := load("streaming"):
        streams = 64
        sustained = [
            row
            for row in streaming["served"]
            if row["streams"] == streams and row["tokens_per_response_median"] <= 4 and row["delay_ms_p99"] <= 50
        ]
        best = max(sustained, key=lambda row: row["tokens_per_s"])
        yield ResultRow(
            f"{streams} gRPC streams through tritonserver of an engine whose program does nothing, client included: "
            "the highest rate at a median of at most 4 tokens a response and a p99 delay of at most 50 ms",
            f"{best['tokens_per_s']:,} tokens/s ({streaming['engine_tokens_per_s'][str(streams)]:,} by the engine "
            f"alone); median {best['tokens_per_response_median']:g} a response, delay p99 {best['delay_ms_p99']:g} ms",
            streaming["device"],
        )


def _latency() -> Iterator[ResultRow]:
    for run in load_all("online"):
        levels = run["levels"]
        yield ResultRow(
            f"Latency, {run['model']} with random weights, {run['workload']} tokens in and out, "
            f"{', '.join(str(level['concurrency']) for level in levels)} requests in flight",
            f"first token {medians(levels, 'first_token_ms')} ms; between tokens "
            f"{medians(levels, 'between_tokens_ms')} ms (medians)",
            run["gpu"],
        )
        if alone := run.get("single_stream"):
            yield ResultRow(
                "One request alone: decoding, against the reading of the weights at the measured bandwidth",
                f"{alone['tokens_per_s']:.0f} tokens/s, {alone['share_of_bound']:.0%}",
                run["gpu"],
            )

    for run in load_all("open_loop"):
        rates = run["rates"]
        asked = " / ".join(f"{rate['rate']:g}" for rate in rates)
        kept = f"; goodput {at_each(rates, 'goodput_per_s')} requests/s" if "slo" in run else ""
        yield ResultRow(
            f"Latency of {run['engine']} at {asked} requests a second ({run['arrivals']}), {run['model']} with random "
            f"weights, {run['workload']} tokens in and out",
            f"normalized latency {at_each(rates, 'normalized_latency_ms', 'mean')} ms a token (means); p99 of the "
            f"first token {at_each(rates, 'first_token_ms', 'p99')} ms, between tokens "
            f"{at_each(rates, 'between_tokens_ms', 'p99')} ms{kept}",
            run["gpu"],
        )


def _without_device() -> Iterator[ResultRow]:
    if loop := load("engine_loop"):
        yield ResultRow(
            f"CPU time of the engine's thread a step, {loop['running_requests']:,} requests decoding, no device",
            f"{loop['total_ms_per_step']:.2f} ms (p99 {loop['p99_step_ms']:.2f})",
            loop["device"],
        )
    if simulated := load("scheduler_sim_conv_300k"):
        forecast, naive = simulated["arms"]["LengthForecast"], simulated["arms"]["ReserveNothing"]
        reserve = simulated["arms"]["ReserveMaxTokens"]
        yield ResultRow(
            f"Azure conversation trace, {forecast['requests']:,} requests, KV for 300k tokens: steps and preemptions "
            "with admission by forecast / without / reserving max_tokens",
            " / ".join(f"{arm['steps']:,} and {arm['preemptions']}" for arm in (forecast, naive, reserve)),
            "simulated, no device",
        )
    for traffic in load_all("multi_round_sim"):
        tiers, without = traffic["arms"]["host_73_gib"]["steady"], traffic["arms"]["recomputing"]["steady"]
        yield ResultRow(
            f"Conversations that come back, {traffic['workload']}, their KV {traffic['settings']['times_device']:g} "
            f"times the device's of {traffic['settings']['kv_cache_tokens']:,} tokens, 73 GiB of host memory, by an "
            "H200's measured costs: rounds a second, stationary",
            f"{tiers['rounds_per_s']:.1f} with tiers, {without['rounds_per_s']:.1f} recomputing; "
            f"{tiers['share_of_bound']:.0%} of the traffic's bound",
            "simulated, no device",
        )


def _faults() -> Iterator[ResultRow]:
    if fuzz := load("fuzz"):
        yield ResultRow(
            f"Fuzz of {fuzz['input_tensors']} input tensors and {fuzz['sampling_fields']} sampling fields, "
            f"{fuzz['cases']:,} requests, {fuzz['over_grpc']['cases'] + fuzz['over_http']['cases']:,} of them through "
            "the real server",
            "all answered, no internal error" if fuzz["failure"] is None else fuzz["failure"],
            fuzz["device"],
        )
    if files := load("mutated_files"):
        answers, errors = files["ends"].get("works", 0), files["ends"].get("refused", 0)
        yield ResultRow(
            f"Files of a model, engine.json and schedules with one random change each: {files['cases']:,} starts",
            f"{answers:,} engines that answer, {errors:,} clear errors, {files['cases'] - answers - errors:,} others",
            files["device"],
        )
    if soak := load("soak"):
        kills, reloads = ([r["event"] for r in soak["rounds"]].count(event) for event in ("kill_engine", "reload"))
        yield ResultRow(
            f"Soak of {soak['minutes']:g} minutes at {soak['overload']:g} times the capacity with cancels, deadlines, "
            f"lost clients, {kills} engine kills and {reloads} reloads: {soak['requests']:,} requests",
            f"{len(soak['failures'])} failures; refusals p99 {soak['refusal_ms_p99']:g} ms; server 2.51 keeps "
            f"{soak['growth']['lost_sockets'][1]:g} sockets of {soak['departures']} gRPC clients that left",
            soak["device"],
        )
    if bursts := load("bursts"):
        yield ResultRow(
            f"{bursts['bursts']} bursts of {bursts['streams']} gRPC streams of tritonclient, each read to its end, "
            f"against {bursts['settings']['max_running']} running and {bursts['settings']['max_queue_size']} waiting: "
            f"{bursts['requests']:,} requests",
            f"server 2.51 alive after {bursts['bursts_alive']}; {len(bursts['failures'])} failures; "
            f"{bursts['ends']['answered']:,} answered whole, the others told that the queue is full",
            bursts["device"],
        )
