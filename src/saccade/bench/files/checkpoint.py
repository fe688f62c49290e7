"""A checkpoint to measure with: random numbers in the published FP8 layout, with DeepSeek-V3.2's own widths.

Knows nothing of measuring. Next: reads.py and convert.py, which write one and measure on it.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from saccade.checkpoint.write import published_fp8
from saccade.models.dsa.config import ModelConfig
from saccade.models.dsa.parameters import parameters
from saccade.plan import Layout

# Few experts and layers: 2.7 GB, 2.5 of it FP8 with 128x128 scales.
BENCH_CONFIG: dict[str, Any] = {
    "model_type": "deepseek_v32", "vocab_size": 8192, "hidden_size": 7168, "intermediate_size": 18432,
    "moe_intermediate_size": 2048, "num_hidden_layers": 3, "first_k_dense_replace": 1, "num_attention_heads": 128,
    "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "n_routed_experts": 16, "n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4,
    "routed_scaling_factor": 2.5, "index_n_heads": 64, "index_head_dim": 128, "index_topk": 2048,
    "rms_norm_eps": 1e-6, "max_position_embeddings": 163840, "rope_theta": 10000.0, "num_nextn_predict_layers": 0,
}  # fmt: skip


def list_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The tensors that a config.json asks for, scales left out."""
    params = parameters(ModelConfig.from_dict(config), Layout())
    return {part.source: part.shape for param in params for part in param.parts}


def synthetic(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Random tensors of these shapes; matrices as FP8 codes with their scales."""
    dice = torch.Generator().manual_seed(seed)
    plain = ((name, torch.randn(shape, generator=dice).mul_(0.02).bfloat16()) for name, shape in shapes.items())
    return published_fp8(plain)
