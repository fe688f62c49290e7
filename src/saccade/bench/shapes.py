"""Named shapes: published models, and the share of one that a rank holds, written as a model of its own.

A rank of eight has an eighth of the heads, of each expert's columns and of the vocabulary, and all of what is
replicated: hidden size, latents, indexer, router. As a config of its own it runs on one device without communication.
Whole models run on as many ranks as have memory for them (`--tp`), or with few layers.
Knows no torch and no weights. Next: synthetic.py fills it with numbers, bytes.py counts what a step must move.
"""

import json
from typing import Any, NamedTuple

from saccade.base.values import is_count, show
from saccade.checkpoint.open import bundled_path
from saccade.config.file import read_config
from saccade.errors import RequestError
from saccade.models.dsa.config import ModelConfig
from saccade.models.registry import find_family

DENSE = 3  # layers without experts at the start of DeepSeek-V3.2 and GLM-5

# DeepSeek-V3.2: 128 heads, experts of 2,048, dense MLPs of 18,432 and 129,280 tokens over 8.
V32_RANK: dict[str, Any] = {
    "model_type": "deepseek_v32", "vocab_size": 16160, "hidden_size": 7168, "intermediate_size": 2304,
    "moe_intermediate_size": 256, "num_hidden_layers": 61, "num_attention_heads": 16, "q_lora_rank": 1536,
    "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 256,
    "n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5,
    "index_n_heads": 64, "index_head_dim": 128, "index_topk": 2048, "rms_norm_eps": 1e-6,
    "max_position_embeddings": 163840, "rope_theta": 10000,
    "rope_scaling": {
        "type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
    },
}  # fmt: skip
# GLM-5: 64 heads, experts of 2,048, dense MLPs of 12,288 and 154,880 tokens over 8.
GLM5_RANK: dict[str, Any] = {
    "model_type": "glm_moe_dsa", "vocab_size": 19360, "hidden_size": 6144, "intermediate_size": 1536,
    "moe_intermediate_size": 256, "num_hidden_layers": 78, "num_attention_heads": 8, "q_lora_rank": 2048,
    "kv_lora_rank": 512, "qk_nope_head_dim": 192, "qk_rope_head_dim": 64, "v_head_dim": 256, "n_routed_experts": 256,
    "n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.5,
    "index_n_heads": 32, "index_head_dim": 128, "index_topk": 2048, "indexer_rope_interleave": True,
    "rms_norm_eps": 1e-5, "max_position_embeddings": 202752,
    "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"},
}  # fmt: skip

# GLM-5.3-Flash: 64 heads of either kind, experts of 2,048, dense MLPs of 12,288 and 154,880 tokens over 8.
FLASH_RANK: dict[str, Any] = {
    "model_type": "glm5_next_text", "vocab_size": 19360, "hidden_size": 4096, "intermediate_size": 1536,
    "moe_intermediate_size": 256, "num_hidden_layers": 45, "num_attention_heads": 8, "q_lora_rank": 1536,
    "kv_lora_rank": 512, "qk_nope_head_dim": 256, "qk_rope_head_dim": 0, "v_head_dim": 256, "n_routed_experts": 288,
    "n_shared_experts": 1, "num_experts_per_tok": 8, "routed_scaling_factor": 2.5, "index_n_heads": 32,
    "index_head_dim": 128, "index_topk": 2048, "index_kpool": 4, "rms_norm_eps": 1e-5, "hc_mult": 4,
    "hc_sinkhorn_iters": 20, "swiglu_limit": 10.0, "max_position_embeddings": 1048576, "linear_num_heads": 8,
    "linear_head_dim": 128, "linear_conv_kernel_dim": 4, "linear_lower_bound": -5.0,
}  # fmt: skip

RANK_OF = 8
SHARED_KEYS = (  # by the ranks
    "vocab_size", "intermediate_size", "moe_intermediate_size", "num_attention_heads", "linear_num_heads",
)  # fmt: skip


def join_shares(rank: dict[str, Any], ranks: int = RANK_OF) -> dict[str, Any]:
    """The model that a rank of eight has its share of; of fewer `ranks`, what so many of them have together."""
    return {key: value * ranks if key in SHARED_KEYS else value for key, value in rank.items()}


BUNDLED_SHAPE = "bundled"
FLASH_SHAPES = {"glm5-next-rank-of-8": FLASH_RANK, "glm5-next-rank-of-4": join_shares(FLASH_RANK, 2)}
ONE_RANK_SHAPES = {"v32-rank-of-8": V32_RANK, "glm5-rank-of-8": GLM5_RANK} | FLASH_SHAPES
WHOLE_SHAPES = {"v32": join_shares(V32_RANK), "glm5": join_shares(GLM5_RANK)}
SHAPES = (*ONE_RANK_SHAPES, *WHOLE_SHAPES, BUNDLED_SHAPE)


class ModelShape(NamedTuple):
    name: str
    config: ModelConfig  # of the model, or of the rank as a model; without an MTP layer
    notes: tuple[str, ...]  # what differs from the published model


def find_shape(name: str, layers: int | None = None, with_flash: bool = False) -> ModelShape:
    """The shape called `name`, or its first layers and sparse ones up to `layers`. RequestError for another name, or a
    number of layers that is not from 1 to the model's own. `with_flash`: whether GLM-5.3-Flash can be measured so."""
    if name not in SHAPES:
        raise RequestError(f"shape: expected one of {', '.join(SHAPES)}, found {show(name)}")
    if name in FLASH_SHAPES and not with_flash:
        raise RequestError(
            f"shape: {name} is not measured by this command, but by bench decode, prefill, engine and chunks"
        )
    if name == BUNDLED_SHAPE:
        values = {**json.loads(read_config(bundled_path())[0]), "num_nextn_predict_layers": 0}
        dense = values["first_k_dense_replace"]
    else:
        values, dense = dict((ONE_RANK_SHAPES | WHOLE_SHAPES)[name]), DENSE
    most = values["num_hidden_layers"]
    notes = ["one rank, no communication"] if name in ONE_RANK_SHAPES else []
    if layers is not None:
        if not is_count(layers, 1) or layers > most:
            raise RequestError(f"layers: expected an integer from 1 to {most}, found {show(layers)}")
        if layers <= dense:  # sparse layers are most of the model
            dense = min(1, layers - 1)
        values["num_hidden_layers"] = layers
        notes.append(f"{layers} of {most} layers, {dense} of them dense")
    values["first_k_dense_replace"] = dense
    config = find_family(values["model_type"]).read_config(values, name, ())
    assert isinstance(config, ModelConfig)
    return ModelShape(name, config, tuple(notes))
