"""Small checkpoints with real numbers, in the published FP8 layout, written by the safetensors library, not by ours."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch
from header_checkpoints import published
from safetensors.torch import save_file
from torch import Tensor

TORCH = {"BF16": torch.bfloat16, "F32": torch.float32, "F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu}


def small_config(**changes: object) -> dict:
    """A deepseek_v32 whose matrices have ragged blocks: kv_a 3.5, kv_b heads 1.25, experts 1.5 blocks of rows."""
    return {
        "model_type": "deepseek_v32", "vocab_size": 320, "hidden_size": 256, "intermediate_size": 384,
        "moe_intermediate_size": 192, "num_hidden_layers": 3, "first_k_dense_replace": 1, "num_attention_heads": 4,
        "q_lora_rank": 256, "kv_lora_rank": 416, "qk_nope_head_dim": 96, "qk_rope_head_dim": 32, "v_head_dim": 64,
        "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 4, "topk_group": 2,
        "routed_scaling_factor": 2.5, "index_n_heads": 16, "index_head_dim": 64, "index_topk": 16,
        "rms_norm_eps": 1e-6, "max_position_embeddings": 4096, "rope_theta": 10000.0, "num_nextn_predict_layers": 1,
    } | changes  # fmt: skip


def small_tensors(config: dict, seed: int = 0, power_of_two: bool = True, mtp_copies: bool = True) -> dict[str, Tensor]:
    """Random numbers for every published tensor. Scales of neighbouring blocks differ by up to 2^6, because k_norm
    removes a factor that all blocks of wk share."""
    dice = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, dtype, shape in published(config, mtp_copies):
        if name.endswith("scale_inv"):
            scale = torch.exp2(torch.randint(-9, -3, shape, generator=dice).float())
            if not power_of_two:
                scale = scale * (1 + torch.rand(shape, generator=dice))
            tensors[name] = scale.to(TORCH[dtype])
        else:
            tensors[name] = torch.randn(shape, generator=dice).to(TORCH[dtype])
            if "norm" in name and name.endswith("weight"):
                tensors[name] = (1 + 0.3 * torch.randn(shape, generator=dice)).to(TORCH[dtype])
    return tensors


def write_small(
    root: Path,
    config: dict,
    tensors: dict[str, Tensor],
    shard_of: Callable[[str], int] = lambda _: 0,
    seed: int | None = None,
) -> Path:
    """config.json, shards and index.json. `seed` shuffles the order in which the names are written."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "config.json").write_text(json.dumps(config))
    names = list(tensors)
    if seed is not None:
        names = [names[i] for i in torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))]
    shards: dict[int, dict[str, Tensor]] = {}
    for name in names:
        shards.setdefault(shard_of(name), {})[name] = tensors[name].contiguous()
    weight_map = {}
    for k, (_, shard) in enumerate(sorted(shards.items()), 1):
        file = f"model-{k:05}-of-{len(shards):05}.safetensors"
        save_file(shard, root / file)
        weight_map |= dict.fromkeys(shard, file)
    (root / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return root


def decode(tensors: dict[str, Tensor], name: str) -> Tensor:
    """The f32 values of a tensor, by a loop over its blocks: slow, and not the product's code."""
    codes = tensors[name]
    if name + "_scale_inv" not in tensors:
        return codes.float()
    scale = tensors[name + "_scale_inv"].float()
    out = torch.empty(codes.shape)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            block = (slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128))
            out[block] = codes[block].float() * scale[i, j]
    return out


def sums(root: Path, mark: str = " ") -> str:
    """As sha256sum prints them."""
    files = sorted(p for p in root.iterdir() if p.is_file())
    return "".join(f"{hashlib.sha256(p.read_bytes()).hexdigest()} {mark}{p.name}\n" for p in files)
