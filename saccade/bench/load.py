"""How fast a checkpoint loads, against a plain read of the same files into fresh memory. Next: reads.py."""

import time
from typing import Any

from saccade.bench.process import read_status
from saccade.bench.reads import compare_with_read, read_into_memory
from saccade.checkpoint.open import open_model
from saccade.plan import make_plan
from saccade.weights import load


def load_once(root: str, threads: int) -> dict[str, float]:
    """Headers, plan, proof and bytes; with the peak memory beyond the parameters."""
    before = read_status("VmRSS")
    start = time.perf_counter()
    config, index = open_model(root)
    plan = make_plan(config, index)
    weights = load(plan, threads=threads)
    seconds = time.perf_counter() - start
    extra = read_status("VmHWM") - before - plan.device_bytes
    return {
        "seconds": seconds,
        "parameter_bytes": plan.device_bytes,
        "extra_bytes": extra,
        "tensors": len(weights.names()),
    }


def bench_load(model: str | None = None, pairs: int = 5, threads: int = 2) -> dict[str, Any]:
    """Alternate `pairs` plain reads and loads. Raises RequestError before anything is written."""
    return compare_with_read("load", load_once, read_into_memory, model, pairs, threads)
