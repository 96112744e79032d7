"""Rows of what is served on several machines: batches on clusters, ranks on hosts, gateways, rolling updates."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.tables.result_files import load
from benchmarks.tables.result_row import ResultRow


def beyond_one_machine() -> Iterator[ResultRow]:
    if batch := load("ray_batch"):
        cluster, kills = batch["on_the_cluster"], batch["through_kills"]
        grown = max(cluster["memory_growth_mib"].values())
        yield ResultRow(
            f"`nanoflow batch --cluster`: {batch['lines']:,} lines on {batch['nodes']} nodes, steps that "
            f"sleep {batch['step_ms']:g} ms, against as many processes apart; and through {len(kills['killed'])} kills",
            f"{batch['overhead']['whole']:+.1%} time of the whole run, {batch['overhead']['steady']:+.1%} once all "
            f"work; memory grows by {grown:g} MiB at most; output byte for byte that of one machine, with kills too",
            batch["device"],
        )
    if hosts := load("two_hosts"):
        noticed = hosts["noticed_s"]
        cut = max(max(times) for what, times in noticed.items() if what.startswith("link"))
        yield ResultRow(
            f"Two ranks in {hosts['hosts']}, {hosts['tokens_compared']:,} greedy tokens against one rank's",
            f"{len(hosts['failures'])} failures; a link that is cut is noticed within {cut:.1f} s, a rank that is "
            f"killed within {max(noticed['rank killed under load']):.2f} s",
            hosts["device"],
        )
    if scrape := load("scrape"):
        live = [gauge for name, gauge in scrape["gauges"].items() if "pages{" not in name]
        more = scrape["cpu_percent_of_a_core"]["more"]
        yield ResultRow(
            f"The metrics page, every {scrape['period_ms']:g} ms for {scrape['seconds_of_scrapes']:g} s under load: "
            "age of what gateways read, and CPU time beside the same load without metrics",
            f"{min(gauge['within_50_ms'] for gauge in live):.2%} within 50 ms, "
            f"p99.9 {max(gauge['age_ms']['p99.9'] for gauge in live):g} ms; "
            f"engine {more['engine']:+.1f} %, stub {more['stub']:+.1f} % of a core",
            scrape["device"],
        )
    if update := load("rolling_update"):
        yield ResultRow(
            f"{update['servers']} servers behind a balancer, replaced in turn under {update['clients']} clients",
            f"{sum(update['lost'].values())} of {update['requests']:,} requests lost; while all serve, shares differ "
            f"from their mean by up to {update['furthest_from_mean']:.0%}",
            update["device"],
        )
