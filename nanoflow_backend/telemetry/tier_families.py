"""TIER_FAMILIES are the metrics of the KV cache's tiers: what moves between them, what does not, and how full they are.

They are there, at zero, where there is no tier below the device, too.
"""

from __future__ import annotations

from collections.abc import Mapping

from nanoflow_backend.kvcache.disk.disk_stats import DiskStats, Refusal
from nanoflow_backend.kvcache.tier import Move
from nanoflow_backend.scheduler.tiers.stats import DROPS
from nanoflow_backend.telemetry.family import Family, Values, View

# From where to where a page goes.
ROUTES = {
    Move.STORE: ("device", "host"),
    Move.LOAD: ("host", "device"),
    Move.WRITE: ("host", "disk"),
    Move.READ: ("disk", "host"),
}


def pages(view: View) -> Values:
    """By tier and state."""
    stats = view.stats.scheduler
    values: dict[tuple[str, ...], float] = {
        ("device", "used"): stats.used_pages,
        ("device", "cached"): stats.cached_pages,
        ("device", "free"): stats.num_pages - stats.used_pages - stats.cached_pages,
    }
    if tiers := stats.tiers:
        values["host", "cached"] = tiers.host_used_pages
        values["host", "free"] = tiers.host_pages - tiers.host_used_pages
        if tiers.disk:
            values["disk", "cached"] = tiers.disk.pages
    return values


def _by_route(values: Mapping[str, float]) -> Values:
    """What counts moves by their names."""
    return {route: values.get(move.name.lower(), 0) for move, route in ROUTES.items()}


def _moved_pages(view: View) -> Values:
    tiers = view.stats.scheduler.tiers
    return _by_route(tiers.moved_pages if tiers else {})


def _moved_bytes(view: View) -> Values:
    tiers = view.stats.scheduler.tiers
    return _by_route(tiers.moved_bytes if tiers else {})


def _busy_s(view: View) -> Values:
    tiers = view.stats.scheduler.tiers
    return _by_route(tiers.busy_s if tiers else {})


def _failed_pages(view: View) -> Values:
    tiers = view.stats.scheduler.tiers
    failed = _by_route(tiers.failed_pages if tiers else {})
    return {route: failed[route] for move, route in ROUTES.items() if move in (Move.WRITE, Move.READ)}


def _dropped(view: View) -> Values:
    tiers = view.stats.scheduler.tiers
    return {(why,): tiers.dropped_pages.get(why, 0) if tiers else 0 for why in DROPS}


def _disk(view: View) -> DiskStats:
    tiers = view.stats.scheduler.tiers
    return tiers.disk if tiers and tiers.disk else DiskStats()


def _evicted(view: View) -> Values:
    tiers = view.stats.scheduler.tiers
    return {("host",): tiers.evicted_pages if tiers else 0, ("disk",): _disk(view).evicted_pages}


def _disk_bytes(view: View) -> Values:
    disk = _disk(view)
    return {("used",): disk.used_bytes, ("free",): max(0, disk.max_bytes - disk.used_bytes)}


def _refused_files(view: View) -> Values:
    refused = _disk(view).refused_files
    return {(str(reason),): refused.get(reason, 0) for reason in Refusal}


def _loaded_tokens(view: View) -> Values:
    return {("host",): view.stats.observed.host_tokens, ("disk",): view.stats.observed.disk_tokens}


TIER_FAMILIES = (
    Family("nanoflow_kv_transfer_pages_total", "counter", "KV pages that went from one tier to another",
           _moved_pages, ("source", "target")),
    Family("nanoflow_kv_transfer_bytes_total", "counter", "Bytes of these pages, on all ranks",
           _moved_bytes, ("source", "target")),
    Family("nanoflow_kv_transfer_seconds_total", "counter", "Time that the link or the disk was busy with them",
           _busy_s, ("source", "target")),
    Family("nanoflow_kv_transfer_failures_total", "counter", "KV pages that the disk did not keep, or not give back",
           _failed_pages, ("source", "target")),
    Family("nanoflow_kv_pages_dropped_total", "counter", "KV pages that were to go to a lower tier and did not",
           _dropped, ("reason",)),
    Family("nanoflow_kv_pages_evicted_total", "counter", "KV pages that made room for others in a tier",
           _evicted, ("tier",)),
    Family("nanoflow_kv_files_refused_total", "counter", "Files of the disk tier that were not as written, and removed",
           _refused_files, ("reason",)),
    Family("nanoflow_kv_disk_bytes", "gauge", "Bytes of the disk tier's folder, of all engines that share it",
           _disk_bytes, ("state",)),
    Family("nanoflow_kv_loaded_tokens_total", "counter", "Tokens that were loaded from a lower tier, not computed",
           _loaded_tokens, ("tier",)),
    Family("nanoflow_request_load_time_seconds", "histogram", "From admission to the last page from a lower tier",
           lambda view: view.stats.observed.load_time_s),
)  # fmt: skip
