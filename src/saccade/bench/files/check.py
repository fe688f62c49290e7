"""How fast `check --contents` is, against a plain read of the same files through one buffer.

Memory that must be fetched fresh would make that read slower, and the ratio prettier. Next: reads.py.
"""

import time
from pathlib import Path
from typing import Any

from saccade.base.values import show
from saccade.bench.files.reads import compare_with_read, read_through
from saccade.bench.process import read_status
from saccade.checkpoint.open import open_model
from saccade.errors import RequestError
from saccade.inspect.contents import check_contents


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
    """Alternate `pairs` plain reads and checks; `listing`: digests to compare in the same pass. Raises RequestError
    before anything is written."""
    if listing is not None and not Path(listing).is_file():
        raise RequestError(f"sha256: expected a file of digests, found {show(listing)}")
    return compare_with_read("check", check_once, read_through, model, pairs, threads, listing)
