"""A measurement in a process of its own, and what the kernel says about that process. Linux only."""

from multiprocessing import get_context
from pathlib import Path
from typing import Any


def in_process(job: Any, *args: Any) -> dict[str, float]:
    """`job(*args)` in a fresh interpreter: its peak memory is its own."""
    with get_context("spawn").Pool(1) as pool:
        result: dict[str, float] = pool.apply(job, args)
        return result


def read_status(key: str) -> int:
    """A figure of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}: this measurement needs Linux")
