"""Full-size checkpoints that are all header: the names, dtypes and shapes of published repositories, and no numbers.

Written from the survey of published layouts, not from models/dsa/parameters.py, which is tested against it. Files are sparse:
690 GB of DeepSeek-V3.2 take some MB of disk, and `read_index` sees true sizes.
"""

import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path

Spec = tuple[str, str, tuple[int, ...]]  # name, dtype, shape

BYTES = {"BF16": 2, "F16": 2, "F32": 4, "F8_E4M3": 1, "F8_E8M0": 1, "U8": 1, "I8": 1, "I64": 8}


def fp8(name: str, rows: int, cols: int, scale: str = "F32") -> Iterator[Spec]:
    yield f"{name}.weight", "F8_E4M3", (rows, cols)
    yield f"{name}.weight_scale_inv", scale, (math.ceil(rows / 128), math.ceil(cols / 128))


def bf16(name: str, *shape: int) -> Iterator[Spec]:
    yield name, "BF16", shape


def indexer(c: dict, x: str) -> Iterator[Spec]:
    yield from fp8(x + "wq_b", c["index_n_heads"] * c["index_head_dim"], c["q_lora_rank"])
    yield from fp8(x + "wk", c["index_head_dim"], c["hidden_size"])
    yield from bf16(x + "weights_proj.weight", c["index_n_heads"], c["hidden_size"])
    yield f"{x}k_norm.weight", "F32", (c["index_head_dim"],)
    yield f"{x}k_norm.bias", "F32", (c["index_head_dim"],)


def mlp(c: dict, x: str, width: int) -> Iterator[Spec]:
    yield from fp8(x + "gate_proj", width, c["hidden_size"])
    yield from fp8(x + "up_proj", width, c["hidden_size"])
    yield from fp8(x + "down_proj", c["hidden_size"], width)


def block(c: dict, x: str, has_indexer: bool, is_dense: bool) -> Iterator[Spec]:
    hidden, heads = c["hidden_size"], c["num_attention_heads"]
    nope, rope, v = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"]
    yield from bf16(x + "input_layernorm.weight", hidden)
    yield from bf16(x + "post_attention_layernorm.weight", hidden)
    a = x + "self_attn."
    yield from fp8(a + "q_a_proj", c["q_lora_rank"], hidden)
    yield from bf16(a + "q_a_layernorm.weight", c["q_lora_rank"])
    yield from fp8(a + "q_b_proj", heads * (nope + rope), c["q_lora_rank"])
    yield from fp8(a + "kv_a_proj_with_mqa", c["kv_lora_rank"] + rope, hidden)
    yield from bf16(a + "kv_a_layernorm.weight", c["kv_lora_rank"])
    yield from fp8(a + "kv_b_proj", heads * (nope + v), c["kv_lora_rank"])
    yield from fp8(a + "o_proj", hidden, heads * v)
    if has_indexer:
        yield from indexer(c, a + "indexer.")
    if is_dense:
        yield from mlp(c, x + "mlp.", c["intermediate_size"])
        return
    yield from bf16(x + "mlp.gate.weight", c["n_routed_experts"], hidden)
    yield f"{x}mlp.gate.e_score_correction_bias", "F32", (c["n_routed_experts"],)
    for e in range(c["n_routed_experts"]):
        yield from mlp(c, f"{x}mlp.experts.{e}.", c["moe_intermediate_size"])
    yield from mlp(c, x + "mlp.shared_experts.", c["moe_intermediate_size"] * c["n_shared_experts"])


def published(c: dict, mtp_copies: bool) -> list[Spec]:
    """Every tensor of an FP8 repository with this config.json. `mtp_copies`: the MTP layer has embedding and head."""
    layers, types = c["num_hidden_layers"], c.get("indexer_types")
    specs = [*bf16("model.embed_tokens.weight", c["vocab_size"], c["hidden_size"])]
    for i in range(layers):
        has_indexer = types is None or types[i] == "full"
        specs += block(c, f"model.layers.{i}.", has_indexer, i < c["first_k_dense_replace"])
    specs += bf16("model.norm.weight", c["hidden_size"])
    specs += bf16("lm_head.weight", c["vocab_size"], c["hidden_size"])
    x = f"model.layers.{layers}."
    specs += block(c, x, True, False)
    for name in ("enorm.weight", "hnorm.weight", "shared_head.norm.weight"):
        specs += bf16(x + name, c["hidden_size"])
    specs += bf16(x + "eh_proj.weight", c["hidden_size"], 2 * c["hidden_size"])
    if mtp_copies:
        specs += bf16(x + "embed_tokens.weight", c["vocab_size"], c["hidden_size"])
        specs += bf16(x + "shared_head.head.weight", c["vocab_size"], c["hidden_size"])
    return specs


def write_headers(root: Path, config: dict, specs: Iterable[Spec], shard_bytes: int = 5 << 30) -> Path:
    """A directory with config.json, index.json and sparse shards that hold the specs in order."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "config.json").write_text(json.dumps(config))
    shards: list[dict] = [{}]
    at = 0
    for name, dtype, shape in specs:
        size = math.prod(shape) * BYTES[dtype]
        if at + size > shard_bytes and shards[-1]:
            shards.append({})
            at = 0
        shards[-1][name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    weight_map = {}
    for k, header in enumerate(shards, 1):
        file = f"model-{k:05}-of-{len(shards):05}.safetensors"
        write_sparse(root / file, header)
        weight_map |= dict.fromkeys(header, file)
    (root / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return root


def write_sparse(path: Path, header: dict) -> None:
    raw = json.dumps(header).encode()
    with path.open("wb") as f:
        f.write(len(raw).to_bytes(8, "little") + raw)
        f.truncate(8 + len(raw) + max((t["data_offsets"][1] for t in header.values()), default=0))
