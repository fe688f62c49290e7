"""How long something that reads a checkpoint takes, against a plain sequential read of the same files.

Each measurement is a process of its own, so that peak memory is that of one; job and plain read alternate, the page
cache is warmed first, and the figure to quote is the median ratio of a pair. What the job is: load.py and check.py.
"""

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from saccade.base.values import is_count, show
from saccade.bench.files.checkpoint import BENCH_CONFIG, list_shapes, synthetic
from saccade.bench.process import in_process
from saccade.checkpoint.index import read_index
from saccade.checkpoint.write import write_checkpoint
from saccade.errors import RequestError
from saccade.inspect.contents import READ_BUFFER

ReadJob = Callable[..., dict[str, float]]


def read_through(root: str) -> dict[str, float]:
    """Every shard, front to back, through one buffer that stays in the cache, as `cat` would: the fastest read."""
    buffer = memoryview(bytearray(READ_BUFFER))
    start = time.perf_counter()
    for path in sorted(Path(root).glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return {"seconds": time.perf_counter() - start}


def read_into_memory(root: str) -> dict[str, float]:
    """Every shard, front to back, each into fresh memory of its own: the least that a load has to do."""
    kept = []
    start = time.perf_counter()
    for path in sorted(Path(root).glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            memory = memoryview(torch.empty(path.stat().st_size, dtype=torch.uint8).numpy().data)
            kept.append(memory)
            at = 0
            while at < len(memory):
                at += file.readinto(memory[at:]) or 0
    return {"seconds": time.perf_counter() - start}


def compare_with_read(
    name: str, job: ReadJob, read: ReadJob, model: str | None, pairs: int, threads: int, *args: Any
) -> dict[str, Any]:
    """Alternate `pairs` plain reads and `job(root, threads, *args)`, which gives its `seconds`; of what it calls
    `*_bytes` the most is reported. Without `model`: on a synthetic FP8 checkpoint of 2.7 GB.

    Raises RequestError before anything is written.
    """
    for key, value in (("pairs", pairs), ("threads", threads)):
        if not is_count(value, 1):
            raise RequestError(f"{key}: expected an integer of at least 1, found {show(value)}")
    if model is None:
        with tempfile.TemporaryDirectory(prefix="saccade-bench-") as folder:
            write_checkpoint(Path(folder), BENCH_CONFIG, synthetic(list_shapes(BENCH_CONFIG)), shards=4)
            found = compare_with_read(name, job, read, folder, pairs, threads, *args)
        return found | {"checkpoint": "synthetic"}
    nbytes = sum(file.size for file in read_index(model).files)
    in_process(read, model)  # warms the page cache
    rows = []
    for _ in range(pairs):
        plain, done = in_process(read, model), in_process(job, model, threads, *args)
        rows.append({"plain_s": plain["seconds"], f"{name}_s": done.pop("seconds"), **done})
    sizes = {key for key in rows[0] if key.endswith("_bytes")}
    return {
        "command": " ".join(["saccade", *sys.argv[1:]]),
        "checkpoint": model,
        "file_bytes": nbytes,
        "threads": threads,
        "cpus": os.cpu_count(),
        "torch": torch.__version__,
        "pairs": rows,
        "median_times_plain": statistics.median(r[f"{name}_s"] / r["plain_s"] for r in rows),
        f"median_{name}_gb_s": statistics.median(nbytes / r[f"{name}_s"] for r in rows) / 1e9,
        "median_plain_gb_s": statistics.median(nbytes / r["plain_s"] for r in rows) / 1e9,
        **{f"most_{key.removesuffix('_bytes')}_mib": max(r[key] for r in rows) / 2**20 for key in sorted(sizes)},
    }
