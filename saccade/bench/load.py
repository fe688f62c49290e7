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
from saccade.weights import load

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
    """Alternate `pairs` plain reads and loads of `model`, or of a synthetic FP8 checkpoint of 2.7 GB.

    Raises RequestError before anything is written.
    """
    for name, value in (("pairs", pairs), ("threads", threads)):
        if not is_count(value, 1):
            raise RequestError(f"{name}: expected an integer of at least 1, found {show(value)}")
    if model is not None:
        return _measure(model, pairs, threads)
    with tempfile.TemporaryDirectory(prefix="saccade-bench-") as folder:
        write_checkpoint(Path(folder), CONFIG, synthetic(), shards=4)
        return _measure(folder, pairs, threads)


def _measure(root: str, pairs: int, threads: int) -> dict[str, Any]:
    nbytes = sum(file.size for file in read_index(root).files)
    in_process(read_plainly, root)  # warms the page cache
    rows = []
    for _ in range(pairs):
        plain, loaded = in_process(read_plainly, root), in_process(load_once, root, threads)
        rows.append({"plain_s": plain["seconds"], "load_s": loaded["seconds"], **loaded})
    return {
        "command": " ".join(["saccade", *sys.argv[1:]]),
        "checkpoint": root,
        "file_bytes": nbytes,
        "threads": threads,
        "cpus": os.cpu_count(),
        "torch": torch.__version__,
        "pairs": rows,
        "median_ratio": statistics.median(r["plain_s"] / r["load_s"] for r in rows),
        "median_load_gb_s": statistics.median(nbytes / r["load_s"] for r in rows) / 1e9,
        "median_plain_gb_s": statistics.median(nbytes / r["plain_s"] for r in rows) / 1e9,
        "most_extra_mib": max(r["extra_bytes"] for r in rows) / 2**20,
    }
