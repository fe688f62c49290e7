"""How fast a checkpoint loads, against a plain read of the same files into fresh memory. Next: reads.py."""

import time
from typing import Any

import torch

from saccade.api.settings.devices import choose_device
from saccade.bench.files.reads import compare_with_read, read_into_memory
from saccade.bench.process import read_status
from saccade.checkpoint.open import open_model
from saccade.plan import make_plan
from saccade.weights.loader import count_threads, load


def load_once(root: str, threads: int, device: str) -> dict[str, float]:
    """Headers, plan, proof and bytes; with the peak memory beyond the parameters, on the host and on a GPU."""
    is_gpu = device != "cpu"
    if is_gpu:
        torch.zeros(1, device=device)  # starting CUDA takes seconds and is no part of a load
    before = read_status("VmRSS")
    start = time.perf_counter()
    config, index = open_model(root)
    plan = make_plan(config, index)
    weights = load(plan, device, threads)
    seconds = time.perf_counter() - start
    extra = read_status("VmHWM") - before
    result = {
        "seconds": seconds,
        "parameter_bytes": plan.device_bytes,
        "extra_bytes": extra if is_gpu else extra - plan.device_bytes,
        "tensors": len(weights.names()),
    }
    if is_gpu:
        result["gpu_extra_bytes"] = torch.cuda.max_memory_allocated(device) - plan.device_bytes
        result["pinned_bytes"] = torch.cuda.host_memory_stats().get("allocated_bytes.peak", 0)
    return result


def bench_load(
    model: str | None = None, pairs: int = 5, threads: int | None = None, device: str = "cpu"
) -> dict[str, Any]:
    """Alternate `pairs` plain reads and loads to `device`.

    Raises RequestError, or ConfigError for a device that is not there, before anything is written.
    """
    device = choose_device(device, torch.cuda.device_count() if torch.cuda.is_available() else 0)
    if threads is None:
        threads = count_threads(device)
    found = compare_with_read("load", load_once, read_into_memory, model, pairs, threads, device)
    return found | {"device": torch.cuda.get_device_name(device) if device != "cpu" else "cpu"}
