"""The disk tier's store alone: bytes a second that it writes and reads, with its checksums, and what a scan takes."""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from mmap import mmap
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
import xxhash

from nanoflow_backend.bench import result
from nanoflow_backend.kvcache.content_hash import HASH_BYTES
from nanoflow_backend.kvcache.disk.page_file import PageLayout
from nanoflow_backend.kvcache.disk.page_folder import PageFolder
from nanoflow_backend.kvcache.tier import FIRST

SMALL_BYTES = 4096


def main(
    folder: Annotated[Path, typer.Option(exists=True, file_okay=False, help="On the disk that is to be measured.")],
    page_mib: Annotated[float, typer.Option(help="Of a payload; 8: 64 tokens of Llama-3-8B in bf16.")] = 8.0,
    pages: Annotated[int, typer.Option(min=8, help="Of each run.")] = 128,
    threads: Annotated[int, typer.Option(min=1, help="That write, or read, at once.")] = 4,
    files: Annotated[int, typer.Option(min=1, help="Of the folder that is scanned.")] = 20_000,
    output: Annotated[Path | None, typer.Option(help="Where the JSON result goes; default: standard output.")] = None,
) -> None:
    """Measure writes, with and without waiting for the disk, reads through the page cache and past it, and a scan."""
    page_bytes = int(page_mib * 2**20) // SMALL_BYTES * SMALL_BYTES
    runs: list[dict[str, Any]] = []
    for workers in sorted({1, threads}):
        for sync in (False, True):
            with TemporaryDirectory(dir=folder) as path:
                rates = _write_and_read(Path(path), page_bytes, pages, workers, sync)
            runs.append({"threads": workers, "sync": sync, **rates})
            print(runs[-1], flush=True)
    with TemporaryDirectory(dir=folder) as path:
        small = _scan(Path(path), files)
    settings = {"page_bytes": page_bytes, "pages": pages, "threads": threads, "files": files}
    found = {"checksum_gb_per_s": _checksums(page_bytes), "runs": runs, "small_files": small}
    result.write({"settings": settings, **found}, output)


def _write_and_read(path: Path, page_bytes: int, pages: int, workers: int, sync: bool) -> dict[str, float]:
    """GB/s of payloads. The reads past the page cache come first: the others would find in it what was just written."""
    layout = _layout(page_bytes)
    payloads = [memoryview(mmap(-1, page_bytes)) for _ in range(workers)]
    for payload in payloads:
        payload[:] = os.urandom(page_bytes)
    cached, direct = PageFolder(path, 2**50, layout, sync=sync, direct=False), PageFolder(path, 2**50, layout)
    if not direct.direct:
        raise typer.BadParameter(f"expected a file system with direct reads, {path} has none", param_hint="--folder")

    def rate(call: Callable[[bytes, memoryview], None]) -> float:
        def part(worker: int) -> None:
            for number in range(worker, pages, workers):
                call(_content(number), payloads[worker])

        start_s = time.perf_counter()
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(part, range(workers)))
        return float(f"{pages * page_bytes / (time.perf_counter() - start_s) / 1e9:.3g}")

    written = rate(lambda content, payload: cached.write(content, payload, FIRST))
    direct.scan()
    os.sync()
    return {
        "write_gb_per_s": written,
        "read_past_cache_gb_per_s": rate(direct.read),
        "read_gb_per_s": rate(cached.read),
    }


def _scan(path: Path, files: int) -> dict[str, float]:
    """What a file costs beside its bytes."""
    folder, payload = PageFolder(path, 2**50, _layout(SMALL_BYTES)), memoryview(mmap(-1, SMALL_BYTES))
    times = {}
    for name, call in {
        "write_us": lambda content: folder.write(content, payload, FIRST),
        "read_us": lambda content: folder.read(content, payload),
    }.items():
        start_s = time.perf_counter()
        for number in range(files):
            call(_content(number))
        times[name] = round(1e6 * (time.perf_counter() - start_s) / files, 1)
    start_s = time.perf_counter()
    folder.scan()
    return {"files": files, **times, "scan_s": round(time.perf_counter() - start_s, 3)}


def _checksums(page_bytes: int) -> dict[str, float]:
    """Of a page, which mostly lies in a cache of the processor."""
    page, rates = memoryview(bytearray(os.urandom(page_bytes))), {}
    for name, call in {"xxh3_64": xxhash.xxh3_64_intdigest, "zlib.crc32": zlib.crc32}.items():
        seconds = []
        for _ in range(9):
            start_s = time.perf_counter()
            call(page)
            seconds.append(time.perf_counter() - start_s)
        rates[name] = round(page_bytes / median(seconds) / 1e9, 2)
    return rates


def _layout(page_bytes: int) -> PageLayout:
    return PageLayout("none", "none", "none", page_tokens=64, rank=0, world=1, payload_bytes=page_bytes)


def _content(number: int) -> bytes:
    return (number + 1).to_bytes(HASH_BYTES, "little")
