"""The toy's config.json."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from saccade.config.keys import Keys
from saccade.errors import ConfigError

SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "q_lora_rank",
    "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "index_n_heads", "index_head_dim",
    "index_topk", "sum_dim", "max_position_embeddings",
)  # fmt: skip
KINDS = ("attention", "running_sum")


@dataclass(frozen=True)
class ToyConfig:
    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    sum_dim: int
    max_position_embeddings: int
    layer_types: tuple[str, ...]
    eos_token_ids: tuple[int, ...]
    notes: tuple[str, ...] = ()
    eps: float = 1e-6
    num_nextn_predict_layers: int | None = 0
    index_share_for_mtp_iteration: bool = False
    scale_fmt: str | None = None


def read_config(values: Mapping[str, Any], source: str, notes: tuple[str, ...]) -> ToyConfig:
    keys = Keys(values, notes=list(notes))
    sizes = {name: keys.whole(name) for name in SIZES}
    kinds, ends = keys.choices("layer_types", KINDS, sizes["num_hidden_layers"]), keys.tokens("eos_token_id")
    keys.note_unknown({*SIZES, "model_type", "layer_types", "eos_token_id"})
    if keys.problems:
        raise ConfigError(f"{source}: this config cannot be run:\n  " + "\n  ".join(keys.problems))
    return ToyConfig("toy_dsa", **sizes, layer_types=kinds, eos_token_ids=ends, notes=tuple(keys.notes))
