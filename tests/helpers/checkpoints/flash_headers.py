"""Names, dtypes and shapes of GLM-5.3-Flash's tensors, as published. Written from its config.json and from readers of
its checkpoints, not from models/glm5_next/parameters.py, which is tested against it. Imports nothing of ours."""

from collections.abc import Iterator
from typing import Any

Spec = tuple[str, str, tuple[int, ...]]  # name, dtype, shape
ROOT = "model.language_model."


def published_flash(config: dict[str, Any]) -> Iterator[Spec]:
    """Every tensor of the BF16 model."""
    c = config["text_config"]
    hidden, layers = c["hidden_size"], c["num_hidden_layers"]
    yield ROOT + "embed_tokens.weight", "BF16", (c["vocab_size"], hidden)
    for i in range(layers):
        x = f"{ROOT}layers.{i}."
        for block in ("attn", "ffn"):
            n = c["hc_mult"]
            yield f"{x}hc_{block}_fn", "BF16", ((2 + n) * n, n * hidden)
            yield f"{x}hc_{block}_base", "F32", ((2 + n) * n,)
            yield f"{x}hc_{block}_scale", "F32", (3,)
        yield from decoder_layer(c, x, c["layer_types"][i] == "linear_attention", i < c["first_k_dense_replace"])
    yield ROOT + "norm.weight", "BF16", (hidden,)
    yield "lm_head.weight", "BF16", (c["vocab_size"], hidden)
    x = f"{ROOT}layers.{layers}."
    for name in ("enorm", "hnorm", "shared_head.norm"):
        yield f"{x}{name}.weight", "BF16", (hidden,)
    yield x + "eh_proj.weight", "BF16", (hidden, 2 * hidden)
    yield from decoder_layer(c, x, False, False)
    yield from vision_tower(config["vision_config"])


def decoder_layer(c: dict[str, Any], x: str, is_recurrent: bool, is_dense: bool) -> Iterator[Spec]:
    hidden = c["hidden_size"]
    yield x + "input_layernorm.weight", "BF16", (hidden,)
    yield x + "post_attention_layernorm.weight", "BF16", (hidden,)
    yield from recurrence(c, x + "self_attn.") if is_recurrent else attention(c, x + "self_attn.")
    if is_dense:
        yield from mlp(x + "mlp.", hidden, c["intermediate_size"])
        return
    yield x + "mlp.gate.weight", "BF16", (c["n_routed_experts"], hidden)
    yield x + "mlp.gate.e_score_correction_bias", "F32", (c["n_routed_experts"],)
    for e in range(c["n_routed_experts"]):
        yield from mlp(f"{x}mlp.experts.{e}.", hidden, c["moe_intermediate_size"])
    yield from mlp(x + "mlp.shared_experts.", hidden, c["moe_intermediate_size"] * c["n_shared_experts"])


def recurrence(c: dict[str, Any], a: str) -> Iterator[Spec]:
    linear, hidden = c["linear_attn_config"], c["hidden_size"]
    heads, dim = linear["num_heads"], linear["head_dim"]
    width = heads * dim
    for name in "qkv":
        yield f"{a}{name}_proj.weight", "BF16", (width, hidden)
        yield f"{a}{name}_conv1d.weight", "BF16", (width, 1, linear["short_conv_kernel_size"])
    for name in "fg":
        yield f"{a}{name}_a_proj.weight", "BF16", (dim, hidden)
        yield f"{a}{name}_b_proj.weight", "BF16", (width, dim)
    yield a + "b_proj.weight", "BF16", (heads, hidden)
    yield a + "A_log", "F32", (heads,)
    yield a + "dt_bias", "F32", (width,)
    yield a + "o_norm.weight", "BF16", (dim,)
    yield a + "o_proj.weight", "BF16", (hidden, width)


def attention(c: dict[str, Any], a: str) -> Iterator[Spec]:
    hidden, heads, q_rank, rank = c["hidden_size"], c["num_attention_heads"], c["q_lora_rank"], c["kv_lora_rank"]
    nope, v, dim = c["qk_nope_head_dim"], c["v_head_dim"], c["index_head_dim"]
    yield a + "q_a_proj.weight", "BF16", (q_rank, hidden)
    yield a + "q_a_layernorm.weight", "BF16", (q_rank,)
    yield a + "q_b_proj.weight", "BF16", (heads * nope, q_rank)
    yield a + "kv_a_proj_with_mqa.weight", "BF16", (rank, hidden)
    yield a + "kv_a_layernorm.weight", "BF16", (rank,)
    yield a + "kv_b_proj.weight", "BF16", (heads * (nope + v), rank)
    yield a + "o_proj.weight", "BF16", (hidden, heads * v)
    i = a + "indexer."
    yield i + "wq_b.weight", "BF16", (c["index_n_heads"] * dim, q_rank)
    yield i + "wk.weight", "BF16", (dim, hidden)
    yield i + "weights_proj.weight", "BF16", (c["index_n_heads"], hidden)
    yield i + "k_norm.weight", "BF16", (dim,)
    yield i + "k_norm.bias", "BF16", (dim,)
    yield i + "index_kpool_compress_gate", "BF16", (dim, hidden)
    yield i + "index_kpool_compress_ape", "BF16", (c["index_kpool"], dim)


def mlp(x: str, hidden: int, width: int) -> Iterator[Spec]:
    yield x + "gate_proj.weight", "BF16", (width, hidden)
    yield x + "up_proj.weight", "BF16", (width, hidden)
    yield x + "down_proj.weight", "BF16", (hidden, width)


def vision_tower(c: dict[str, Any]) -> Iterator[Spec]:
    """Its blocks and what stands around them; nothing reads it."""
    hidden, width, v = c["hidden_size"], c["intermediate_size"], "model.visual."
    yield v + "patch_embed.proj.weight", "BF16", (hidden, 3, 2, 14, 14)
    for i in range(c["depth"]):
        x = f"{v}blocks.{i}."
        yield x + "attn.qkv.weight", "BF16", (3 * hidden, hidden)
        yield x + "attn.qkv.bias", "BF16", (3 * hidden,)
        yield x + "attn.proj.weight", "BF16", (hidden, hidden)
        yield from mlp(x + "mlp.", hidden, width)
        yield x + "norm1.weight", "BF16", (hidden,)
        yield x + "norm2.weight", "BF16", (hidden,)
    yield from mlp(v + "merger.", c["out_hidden_size"], c["projection_intermediate_size"])


def small_flash_config() -> dict[str, Any]:
    """Matrices with ragged blocks: kv_a 2.25, experts 1.5 blocks of rows. Two recurrent layers, two that attend."""
    types = ["linear_attention", "deepseek_sparse_attention"] * 2
    text = {
        "model_type": "glm5_next_text", "vocab_size": 320, "hidden_size": 256, "intermediate_size": 384,
        "moe_intermediate_size": 192, "num_hidden_layers": 4, "first_k_dense_replace": 1, "num_attention_heads": 4,
        "q_lora_rank": 256, "kv_lora_rank": 288, "qk_nope_head_dim": 96, "qk_rope_head_dim": 0, "v_head_dim": 64,
        "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2, "routed_scaling_factor": 2.5,
        "index_n_heads": 16, "index_head_dim": 64, "index_topk": 16, "index_kpool": 4, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096, "num_nextn_predict_layers": 1, "layer_types": types, "hc_mult": 4,
        "hc_sinkhorn_iters": 20, "swiglu_limit": 10.0, "mhc": True, "mla_use_nope": True, "index_kpool_compress": True,
        "linear_attn_config": {
            "num_heads": 4, "head_dim": 64, "short_conv_kernel_size": 4, "gate_lower_bound": -5.0,
            "kda_layers": [0, 2], "full_attn_layers": [1, 3],
        },
    }  # fmt: skip
    vision = {
        "model_type": "glm5_next_vision", "depth": 1, "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 32,
        "projection_intermediate_size": 64,
    }  # fmt: skip
    return {"model_type": "glm5_next", "text_config": text, "vision_config": vision, "image_token_id": 310}
