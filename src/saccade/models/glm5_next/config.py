"""The config.json of GLM-5.3-Flash, read strictly into a frozen FlashConfig.

It is a DSA model's config (dsa/config.py) with more in it: which layers are recurrent (KDA, Kimi delta attention),
pools of index keys, and residual streams (mHC). The published file also describes a vision tower, in a table of its
own; only the text model is read. There is no RoPE at all. Knows no torch. Next: parameters.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from saccade.config.file import find_model_type
from saccade.config.foreign import refuse_foreign
from saccade.config.keys import Keys, show_json
from saccade.config.rope import Rope
from saccade.models.dsa.config import (
    CHECKED_IN_ALL,
    LAYER_LIMIT,
    ModelConfig,
    check_sizes,
    read_indexer_types,
    read_mlp_types,
    refuse_problems,
)
from saccade.models.dsa.config import IRRELEVANT as DSA_IRRELEVANT
from saccade.models.dsa.config import SIZES as DSA_SIZES

MODEL_TYPES = ("glm5_next", "glm5_next_text")  # with images; a text model alone

# Used: positive whole numbers that every config must give. transformers would take 16 for a missing `index_kpool`, the
# published model has 4.
SIZES = (
    *(name for name in DSA_SIZES if name not in ("qk_rope_head_dim", "n_group", "topk_group")),
    "index_kpool", "hc_mult", "hc_sinkhorn_iters",
)  # fmt: skip
MOST_HEAD_DIM = 128  # of recurrent layers that the kernels take
# Of the recurrent layers: our name, and the key inside `linear_attn_config`, where some files have it.
LINEAR = {
    "linear_num_heads": "num_heads",
    "linear_head_dim": "head_dim",
    "linear_conv_kernel_dim": "short_conv_kernel_size",
    "linear_lower_bound": "gate_lower_bound",
}
LAYER_LISTS = {"kda_layers": "recurrent", "full_attn_layers": "attention"}  # of layers, in the same place
USED = {
    *SIZES, *LINEAR, "n_group", "topk_group", "model_type", "routed_scaling_factor", "rms_norm_eps", "mlp_layer_types",
    "first_k_dense_replace", "layer_types", "indexer_types", "index_topk_pattern", "index_topk_freq",
    "index_skip_topk_offset", "index_share_for_mtp_iteration", "num_nextn_predict_layers", "bos_token_id",
    "eos_token_id", "quantization_config", "swiglu_limit", "hc_eps", "linear_attn_config", "text_config",
}  # fmt: skip
CHECKED = CHECKED_IN_ALL | {
    "qk_rope_head_dim": (0,),
    "index_kpool_always_select_tail": (True,),
    "index_kpool_compress": (True,),
    "mhc": (True,),
    "mla_use_nope": (True,),
}
CHECKED_BY_RULE = {"num_key_value_heads", "qk_head_dim"}
# Of the vision tower, of RoPE that no layer has, and what dsa/config.py passes over.
IRRELEVANT = DSA_IRRELEVANT | {
    "vision_config", "image_token_id", "video_token_id", "image_start_token_id", "image_end_token_id",
    "video_start_token_id", "video_end_token_id", "rope_theta", "rope_scaling", "rope_parameters",
    "partial_rotary_factor", "rope_interleave", "indexer_rope_interleave",
}  # fmt: skip

LAYER_KINDS = {  # words of `layer_types`: what transformers writes, and what other files say
    "linear_attention": "recurrent",
    "indexed_attention": "attention",
    "full_attention": "attention",
    "deepseek_sparse_attention": "attention",
}


@dataclass(frozen=True, kw_only=True)
class FlashConfig(ModelConfig):
    """GLM-5.3-Flash, in the words of its config.json. The MTP layer is layer `num_hidden_layers`: attention with an
    indexer, experts, and one residual stream."""

    layer_types: tuple[str, ...]  # "recurrent" or "attention"
    linear_num_heads: int
    linear_head_dim: int  # of queries, keys and values alike
    linear_conv_kernel_dim: int
    linear_lower_bound: float  # of a gate's logarithm, below zero
    index_kpool: int  # tokens whose index keys become one
    hc_mult: int  # residual streams
    hc_eps: float
    hc_sinkhorn_iters: int

    def is_recurrent(self, layer: int) -> bool:
        return layer < self.num_hidden_layers and self.layer_types[layer] == "recurrent"

    def has_indexer(self, layer: int) -> bool:
        """Whether a layer chooses its own tokens. The MTP layer always does, a recurrent one never."""
        return not self.is_recurrent(layer) and super().has_indexer(layer)


def read_flash_config(values: Mapping[str, Any], source: str, notes: tuple[str, ...]) -> FlashConfig:
    """Build from the contents of a config.json. A ConfigError lists every problem, one line each."""
    found = find_model_type(values, source, MODEL_TYPES)
    inner = values.get("text_config")
    merged = dict(values) | (dict(inner) if isinstance(inner, Mapping) else {}) | {"model_type": found}
    keys = Keys(merged, notes=list(notes))
    if inner is not None and not isinstance(inner, Mapping):
        keys.refuse("text_config", inner, "expected an object")
    if isinstance(inner, Mapping) and inner.get("model_type", found) not in MODEL_TYPES:
        keys.refuse("text_config.model_type", inner["model_type"], f"expected {MODEL_TYPES[1]}")
    sizes = {name: keys.whole(name) for name in SIZES}
    sizes |= {name: keys.whole(name, default=1) for name in ("n_group", "topk_group")}
    check_sizes(keys, sizes | {"qk_rope_head_dim": 0})
    for name, accepted in CHECKED.items():
        keys.expect(name, accepted)
    if sizes["index_kpool"] and sizes["index_topk"] % sizes["index_kpool"]:
        keys.refuse("index_topk", sizes["index_topk"], f"expected a multiple of index_kpool = {sizes['index_kpool']}")
    layers, eps = sizes["num_hidden_layers"], keys.number("rms_norm_eps")
    kinds = read_kinds(keys, layers)
    claims = merged.get("quantization_config")
    scale_fmt = claims.get("scale_fmt") if isinstance(claims, Mapping) else None
    read: dict[str, Any] = dict(
        **sizes,
        **read_linear(keys, kinds),
        model_type=found,
        qk_rope_head_dim=0,
        layer_types=kinds,
        routed_scaling_factor=keys.number("routed_scaling_factor"),
        rms_norm_eps=eps,
        latent_norm_eps=eps,
        mlp_layer_types=read_mlp_types(keys, layers),
        indexer_types=read_indexer_types(keys, layers),
        indexer_rope_interleave=False,
        index_share_for_mtp_iteration=keys.flag("index_share_for_mtp_iteration", False),
        num_nextn_predict_layers=merged.get("num_nextn_predict_layers"),
        hc_eps=keys.number("hc_eps", default=1e-6),
        swiglu_limit=keys.number("swiglu_limit", default=10.0),
        rope=Rope(10000.0, sizes["max_position_embeddings"]),  # turns nothing: qk_rope_head_dim is 0
        bos_token_id=keys.token("bos_token_id"),
        eos_token_ids=keys.tokens("eos_token_id"),
        scale_fmt=scale_fmt if isinstance(scale_fmt, str) else None,
    )
    first = next((i for i, kind in enumerate(kinds) if kind == "attention"), None)
    if first is not None and read["indexer_types"] and read["indexer_types"][first] != "full":
        keys.problems.append(f"indexer_types: layer {first} shares a selection, but no attention comes before it")
    known = USED | CHECKED.keys() | CHECKED_BY_RULE | IRRELEVANT
    keys.note_unknown(known | refuse_foreign(keys, known))
    refuse_problems(keys, source)
    assert read.keys() | {"notes"} == {field.name for field in fields(FlashConfig)}
    return FlashConfig(**read, notes=tuple(keys.notes))


def read_kinds(keys: Keys, layers: int) -> tuple[str, ...]:
    """layer_types; without it every fourth layer is attention, as transformers takes it."""
    if keys.values.get("layer_types") is None:
        return tuple("attention" if i % 4 == 3 else "recurrent" for i in range(min(layers, LAYER_LIMIT)))
    return tuple(LAYER_KINDS[word] for word in keys.choices("layer_types", tuple(LAYER_KINDS), layers))


def find_gpu_obstacle(config: FlashConfig) -> str:
    """Why the kernels do not take this model, or "": a program of the recurrence holds all keys of a head."""
    if config.linear_head_dim <= MOST_HEAD_DIM:
        return ""
    return f"its recurrent heads have {config.linear_head_dim} dimensions, the kernels take {MOST_HEAD_DIM} at most"


def read_linear(keys: Keys, kinds: tuple[str, ...]) -> dict[str, Any]:
    """Sizes of the recurrent layers, at the top or inside `linear_attn_config`, which then counts. Lists of layers
    inside it must say what layer_types says."""
    inner = Keys(keys.table("linear_attn_config"), "linear_attn_config.", keys.problems, keys.notes)
    read: dict[str, Any] = {}
    for name, key in LINEAR.items():
        place, spelled = (inner, key) if inner.values.get(key) is not None else (keys, name)
        if name == "linear_lower_bound":
            read[name] = read_lower_bound(place, spelled)
        else:
            read[name] = place.whole(spelled)
    inner.expect("safe_gate", (True,))
    for key, kind in LAYER_LISTS.items():
        listed, expected = inner.values.get(key), [i for i, found in enumerate(kinds) if found == kind]
        if kinds and listed is not None and listed != expected:
            inner.refuse(key, listed, f"expected the layers that layer_types says, {show_json(expected)}")
    inner.note_unknown({*LINEAR.values(), *LAYER_LISTS, "safe_gate"})
    return read


def read_lower_bound(keys: Keys, name: str) -> float:
    """A number below zero; transformers takes -5 where a file says none."""
    value = keys.values.get(name, -5.0)
    if isinstance(value, int | float) and not isinstance(value, bool) and -1e3 <= value < 0:
        return float(value)
    keys.refuse(name, value, "expected a number from -1000 to below 0: gates without a bound are not supported")
    return -5.0
