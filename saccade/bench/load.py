"""How fast a checkpoint loads, against a plain sequential read of the same files into fresh memory.

Each measurement is a process of its own, so that peak memory is that of one load. Load and plain read alternate, the
page cache is warmed first, and the figure to quote is the median ratio.
"""

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saccade.bench.process import in_process, read_status
from saccade.checkpoint.index import read_index
from saccade.checkpoint.open import open_model
from saccade.checkpoint.write import published_fp8, write_checkpoint
from saccade.config import ModelConfig
from saccade.errors import RequestError
from saccade.params import is_count, show
from saccade.plan import Layout, make_plan
from saccade.plan.table import parameters
from saccade.settings import choose_device
from saccade.weights import count_threads, load

# DeepSeek-V3.2's own widths with few experts and layers: 2.7 GB, 2.5 of it FP8 with 128x128 scales.
CONFIG: dict[str, Any] = {
    "model_type": "deepseek_v32", "vocab_size": 8192, "hidden_size": 7168, "intermediate_size": 18432,
    "moe_intermediate_size": 2048, "num_hidden_layers": 3, "first_k_dense_replace": 1, "num_attention_heads": 128,
    "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "n_routed_experts": 16, "n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4,
    "routed_scaling_factor": 2.5, "index_n_heads": 64, "index_head_dim": 128, "index_topk": 2048,
    "rms_norm_eps": 1e-6, "max_position_embeddings": 163840, "rope_theta": 10000.0, "num_nextn_predict_layers": 0,
}  # fmt: skip


def synthetic(seed: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Random tensors of CONFIG in the published FP8 layout."""
    config = ModelConfig.from_dict(CONFIG)
    dice = torch.Generator().manual_seed(seed)
    shapes = {part.source: part.shape for param in parameters(config, Layout()) for part in param.parts}
    plain = ((name, torch.randn(shape, generator=dice).mul_(0.02).bfloat16()) for name, shape in shapes.items())
    return published_fp8(plain)


def read_plainly(root: str) -> dict[str, float]:
    """Every shard, front to back, each into memory of its own."""
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


def load_once(root: str, threads: int | None, device: str) -> dict[str, float]:
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
    """Alternate `pairs` plain reads and loads of `model`, or of a synthetic FP8 checkpoint of 2.7 GB, to `device`.

    Raises RequestError, or ConfigError for a device that is not there, before anything is written.
    """
    for name, value in (("pairs", pairs), ("threads", threads)):
        if not (is_count(value, 1) or (name == "threads" and value is None)):
            raise RequestError(f"{name}: expected an integer of at least 1, found {show(value)}")
    device = choose_device(device, torch.cuda.device_count() if torch.cuda.is_available() else 0)
    if model is not None:
        return _measure(model, pairs, threads, device)
    with tempfile.TemporaryDirectory(prefix="saccade-bench-") as folder:
        write_checkpoint(Path(folder), CONFIG, synthetic(), shards=4)
        return _measure(folder, pairs, threads, device)


def _measure(root: str, pairs: int, threads: int | None, device: str) -> dict[str, Any]:
    nbytes = sum(file.size for file in read_index(root).files)
    in_process(read_plainly, root)  # warms the page cache
    rows = []
    for _ in range(pairs):
        plain, loaded = in_process(read_plainly, root), in_process(load_once, root, threads, device)
        rows.append({"plain_s": plain["seconds"], "load_s": loaded["seconds"], **loaded})
    return {
        "command": " ".join(["saccade", *sys.argv[1:]]),
        "checkpoint": root,
        "file_bytes": nbytes,
        "device": torch.cuda.get_device_name(device) if device != "cpu" else "cpu",
        "threads": threads or count_threads(device),
        "cpus": os.cpu_count(),
        "torch": torch.__version__,
        "pairs": rows,
        "median_ratio": statistics.median(r["plain_s"] / r["load_s"] for r in rows),
        "median_load_gb_s": statistics.median(nbytes / r["load_s"] for r in rows) / 1e9,
        "median_plain_gb_s": statistics.median(nbytes / r["plain_s"] for r in rows) / 1e9,
        "most_extra_mib": max(r["extra_bytes"] for r in rows) / 2**20,
        **{
            f"most_{name}_mib": max(r[f"{name}_bytes"] for r in rows) / 2**20
            for name in ("gpu_extra", "pinned")
            if f"{name}_bytes" in rows[0]
        },
    }
