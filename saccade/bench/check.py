"""How fast `check --contents` is, against a plain sequential read of the same files.

The plain read goes through one buffer that stays in the cache, as `cat` would: memory that must be fetched fresh would
make it slower, and the ratio prettier. Each measurement is a process of its own; the two alternate, the page cache is
warmed first, and the figure to quote is the median ratio of a pair.
"""

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from saccade.bench.load import CONFIG, synthetic
from saccade.bench.process import in_process, read_status
from saccade.checkpoint.index import read_index
from saccade.checkpoint.open import open_model
from saccade.checkpoint.write import write_checkpoint
from saccade.errors import RequestError
from saccade.inspect.contents import BUFFER, check_contents
from saccade.params import is_count, show


def read_through(root: str) -> dict[str, float]:
    """Every shard, front to back, through one buffer."""
    buffer = memoryview(bytearray(BUFFER))
    start = time.perf_counter()
    for path in sorted(Path(root).glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return {"seconds": time.perf_counter() - start}


def check_once(root: str, threads: int, listing: str | None) -> dict[str, float]:
    """Headers and contents; with the peak memory beyond what is there before the bytes are read."""
    start = time.perf_counter()
    config, index = open_model(root)
    before = read_status("VmRSS")
    found = check_contents(config, index, True, listing, threads)
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "extra_bytes": read_status("VmHWM") - before,
        "bound_bytes": found.memory_bytes,
        "problems": len(found.problems),
    }


def bench_check(
    model: str | None = None, pairs: int = 5, threads: int = 2, listing: str | None = None
) -> dict[str, Any]:
    """Alternate `pairs` plain reads and checks of `model`, or of a synthetic FP8 checkpoint of 2.7 GB. `listing`:
    digests to compare in the same pass.

    Raises RequestError before anything is written.
    """
    for name, value in (("pairs", pairs), ("threads", threads)):
        if not is_count(value, 1):
            raise RequestError(f"{name}: expected an integer of at least 1, found {show(value)}")
    if model is not None:
        return _measure(model, pairs, threads, listing)
    with tempfile.TemporaryDirectory(prefix="saccade-bench-") as folder:
        write_checkpoint(Path(folder), CONFIG, synthetic(), shards=4)
        return _measure(folder, pairs, threads, listing)


def _measure(root: str, pairs: int, threads: int, listing: str | None) -> dict[str, Any]:
    nbytes = sum(file.size for file in read_index(root).files)
    in_process(read_through, root)  # warms the page cache
    rows = []
    for _ in range(pairs):
        plain, checked = in_process(read_through, root), in_process(check_once, root, threads, listing)
        rows.append({"plain_s": plain["seconds"], "check_s": checked["seconds"], **checked})
    return {
        "command": " ".join(["saccade", *sys.argv[1:]]),
        "checkpoint": root,
        "file_bytes": nbytes,
        "threads": threads,
        "cpus": os.cpu_count(),
        "torch": torch.__version__,
        "pairs": rows,
        "median_times_plain": statistics.median(r["check_s"] / r["plain_s"] for r in rows),
        "median_check_gb_s": statistics.median(nbytes / r["check_s"] for r in rows) / 1e9,
        "median_plain_gb_s": statistics.median(nbytes / r["plain_s"] for r in rows) / 1e9,
        "most_extra_mib": max(r["extra_bytes"] for r in rows) / 2**20,
        "bound_mib": max(r["bound_bytes"] for r in rows) / 2**20,
    }
