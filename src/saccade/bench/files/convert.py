"""How fast `convert --bf16` is, against a plain write of as many bytes as the result has.

The source is synthetic, in the published FP8 layout with DeepSeek-V3.2's widths, and warm in the page cache. Both sides
write files of the same sizes to the same disk and bring each to it (fsync), in processes of their own, so that peak
memory is that of one conversion. They alternate, and the figure to quote is the median ratio of a pair.
"""

import os
import shutil
import statistics
import sys
import tempfile
import time
from math import prod
from pathlib import Path
from typing import Any

import torch

from saccade.base.disk import sync_file
from saccade.base.values import is_count, is_number, show
from saccade.bench.files.checkpoint import BENCH_CONFIG, list_shapes, synthetic
from saccade.bench.files.reads import read_through
from saccade.bench.process import in_process, read_status
from saccade.checkpoint.index import read_index
from saccade.checkpoint.write import write_checkpoint
from saccade.convert.changes import Mode
from saccade.convert.convert import convert
from saccade.errors import RequestError

WRITE_CHUNK = 8 << 20  # bytes of one plain write
SHARDS = 4
LEAST_GB, MOST_GB = 0.1, 1000.0  # GB


def shape_of_size(gigabytes: float) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """A config.json, and the shapes of its tensors, which in BF16 have at least so many bytes. It grows by experts."""
    for experts in range(16, 16384, 8):
        small = {"num_hidden_layers": 2, "intermediate_size": 2048, "n_routed_experts": experts}
        values = BENCH_CONFIG | small
        shapes = list_shapes(values)
        if 2 * sum(map(prod, shapes.values())) >= gigabytes * 1e9:
            break
    return values, shapes


def write_plainly(folder: str, sizes: list[int]) -> dict[str, float]:
    """Files of these sizes, front to back, each brought to the disk."""
    content = memoryview(torch.randint(0, 256, (WRITE_CHUNK,), dtype=torch.uint8).numpy().data)
    start = time.perf_counter()
    for k, size in enumerate(sizes):
        with open(Path(folder, f"plain-{k}"), "wb", buffering=0) as file:
            left = size
            while left:
                left -= file.write(content[:left])
            sync_file(file.fileno())
    return {"seconds": time.perf_counter() - start}


def convert_once(source: str, out: str, threads: int | None) -> dict[str, float]:
    """Headers, proof, bytes, names; with the peak memory beyond that at the start."""
    before = read_status("VmRSS")
    report = convert(source, out, Mode("bf16"), threads)
    return {
        "seconds": report.seconds,
        "threads": report.threads,
        "bytes": report.size,
        "peak_bytes_beyond_start": read_status("VmHWM") - before,
        "bound_bytes": report.memory_bound,
    }


def bench_convert(
    gigabytes: float = 2.0, pairs: int = 5, threads: int | None = None, folder: str | None = None
) -> dict[str, Any]:
    """Alternate `pairs` plain writes and conversions. Raises RequestError before anything is written."""
    if not is_number(gigabytes) or not LEAST_GB <= gigabytes <= MOST_GB:
        raise RequestError(f"gigabytes: expected a number from {LEAST_GB} to {MOST_GB:g}, found {show(gigabytes)}")
    if not is_count(pairs, 1):
        raise RequestError(f"pairs: expected an integer of at least 1, found {show(pairs)}")
    config, shapes = shape_of_size(gigabytes)
    with tempfile.TemporaryDirectory(prefix="saccade-bench-", dir=folder) as place:
        source, out, plain = (Path(place, name) for name in ("source", "out", "plain"))
        write_checkpoint(source, config, synthetic(shapes), shards=SHARDS)
        in_process(read_through, str(source))  # warms the page cache
        sizes, rows = list[int](), []
        for _ in range(pairs):
            done = in_process(convert_once, str(source), str(out), threads)
            sizes = [file.size for file in read_index(out).files]
            shutil.rmtree(out)
            plain.mkdir()
            wrote = in_process(write_plainly, str(plain), sizes)
            shutil.rmtree(plain)
            rows.append({"plain_s": wrote["seconds"], "convert_s": done.pop("seconds"), **done})
        source_bytes = sum(file.size for file in read_index(source).files)
    return {
        "command": " ".join(["saccade", *sys.argv[1:]]),
        "where": str(Path(place).parent),
        "source_bytes": source_bytes,
        "result_bytes": sum(sizes),
        "files": len(sizes),
        "threads": rows[0]["threads"],
        "cpus": os.cpu_count(),
        "torch": torch.__version__,
        "durability": "both sides fsync each file",
        "pairs": rows,
        "median_times_plain": statistics.median(r["convert_s"] / r["plain_s"] for r in rows),
        "median_convert_mb_s": statistics.median(sum(sizes) / r["convert_s"] for r in rows) / 1e6,
        "median_plain_mb_s": statistics.median(sum(sizes) / r["plain_s"] for r in rows) / 1e6,
        "most_peak_mib": max(r["peak_bytes_beyond_start"] for r in rows) / 2**20,
        "bound_mib": rows[0]["bound_bytes"] / 2**20,
    }
