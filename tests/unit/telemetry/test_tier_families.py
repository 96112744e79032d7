"""The tiers of the KV cache on the metrics page: what a scheduler moved, dropped and lost, by its route or reason."""

from __future__ import annotations

import msgspec
from support.scheduler.lossy_disk import LossyDisk
from support.scheduler.tiered import FIRST, SECOND, TieredScheduler, contents
from support.telemetry.page import READY

from nanoflow_backend.kvcache.disk.disk_stats import DiskStats
from nanoflow_backend.kvcache.tier import Move
from nanoflow_backend.process.messages import Stats
from nanoflow_backend.scheduler.tiers.stats import DROPS
from nanoflow_backend.telemetry.metrics import Page

ROUTES = {
    Move.STORE: ("source=device", "target=host"),
    Move.LOAD: ("source=host", "target=device"),
    Move.WRITE: ("source=host", "target=disk"),
    Move.READ: ("source=disk", "target=host"),
}
WRITTEN = list(range(50, 59))  # by an engine before this one


class Disk(LossyDisk):
    """Has what was written, and can tell of worse."""

    stats = DiskStats(5, 700, 1000, refused_files={"checksum": 3}, evicted_pages=4)


def test_what_a_scheduler_moves_is_on_the_page_by_its_route(server, metrics):
    disk = Disk(100)
    for content in contents(WRITTEN):
        disk.write(content, [])
    s = TieredScheduler(num_pages=6, host_slots=8, disk=disk, tier_limits={"store_pages": 1})
    for id, prompt in enumerate((FIRST, SECOND, FIRST, WRITTEN)):
        s.add(id, prompt)
        while s.scheduler.has_work:
            s.end(s.form(), failed=[Move.WRITE] if id == 1 else [], load_page_s=0.25)
    s.add(9, [99] * 8)
    s.step()
    lost = s.lower.abandon()
    metrics.take(Stats(s.scheduler.stats, s.scheduler.observer.observed))
    page = Page(server.create, metrics)
    tiers = s.scheduler.stats.tiers
    failed = server.value("nanoflow_kv_transfer_failures_total", *ROUTES[Move.WRITE])
    assert failed > 0 < tiers.evicted_pages
    assert all(s.count(move) for move in Move)
    for move, route in ROUTES.items():
        moved = s.count(move) - (failed if move is Move.WRITE else 0)
        assert server.value("nanoflow_kv_transfer_pages_total", *route) == moved
        assert server.value("nanoflow_kv_transfer_bytes_total", *route) == 100 * moved
        assert server.value("nanoflow_kv_transfer_seconds_total", *route) == 0.25 * moved * (move is Move.LOAD)
    name = "nanoflow_kv_pages_dropped_total"
    dropped = {labels[0]: value for (of, *labels), value in server.series.items() if of == name}
    assert dropped == {f"reason={why}": lost if why == "closed" else 0 for why in DROPS}
    assert lost == 4
    assert server.value("nanoflow_kv_pages_evicted_total", "tier=host") == tiers.evicted_pages
    assert server.value("nanoflow_request_load_time_seconds_count") == 2
    assert server.value("nanoflow_kv_loaded_tokens_total", "tier=disk") == 2 * len(contents(WRITTEN))
    assert server.value("nanoflow_kv_loaded_tokens_total", "tier=host") == 2 * (
        s.count(Move.LOAD) - len(contents(WRITTEN))
    )
    assert server.value("nanoflow_kv_pages_evicted_total", "tier=disk") == 4
    assert server.value("nanoflow_kv_disk_bytes", "state=free") == 300
    assert server.value("nanoflow_kv_cache_pages", "tier=disk", "state=cached") == 5
    assert server.value("nanoflow_kv_cache_pages", "tier=host", "state=cached") == tiers.host_used_pages
    assert server.value("nanoflow_kv_files_refused_total", "reason=checksum") == 3
    assert server.value("nanoflow_kv_files_refused_total", "reason=magic") == 0
    metrics.engine_restarted(READY)
    page.flush()
    assert server.value("nanoflow_kv_disk_bytes", "state=free") == 0
    assert server.value("nanoflow_kv_transfer_pages_total", *ROUTES[Move.LOAD]) == s.count(Move.LOAD), "it goes on"


def test_counts_of_ranks_add_up_and_the_folder_is_that_of_the_first():
    ranks = [
        DiskStats(5, 700, 1000, 1, 10, 0.5, refused_files={"size": 1, "magic": 1}, failed=2),
        DiskStats(4, 600, 900, 2, 20, 0.25, refused_files={"size": 2}, missing_files=1),
    ]
    joined = DiskStats.of_ranks(ranks)
    assert msgspec.structs.asdict(joined) == msgspec.structs.asdict(DiskStats(5, 700, 1000, 3, 30, 0.75)) | {
        "refused_files": {"size": 3, "magic": 1},
        "failed": 2,
        "missing_files": 1,
    }
