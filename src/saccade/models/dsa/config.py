"""The config.json of DeepSeek-V3.2 and GLM-5, read strictly into a frozen ModelConfig.

Every key is in one of three tables: used, checked (a value that the engine cannot honour is refused by name), known and
irrelevant; what changes other models is refused (foreign.py); other keys fold into one note. "auto" and absent
values are resolved here, once, so nothing to the right looks at a default. Knows no torch, no checkpoint file, and
takes no decision from `quantization_config`: the file headers decide what a tensor is. Next: parameters.py, which reads
this like a forward pass.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

from saccade.config.file import find_model_type, parse_config, read_config
from saccade.config.foreign import refuse_foreign
from saccade.config.keys import Keys
from saccade.config.rope import Rope as Rope
from saccade.config.rope import read_rope
from saccade.errors import ConfigError

MODEL_TYPES = ("deepseek_v32", "glm_moe_dsa")
# Epsilon of q_a_layernorm and kv_a_layernorm. DeepSeek's own code builds them with this default, whatever the config
# says; GLM's takes rms_norm_eps (1e-5), as vLLM and SGLang do. docs/accuracy.md has the sources.
LATENT_NORM_EPS: dict[str, float | None] = {"deepseek_v32": 1e-6, "glm_moe_dsa": None}  # None: rms_norm_eps

# Used: positive whole numbers that every config must give.
SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers",
    "num_attention_heads", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
    "n_routed_experts", "n_shared_experts", "num_experts_per_tok", "n_group", "topk_group", "index_n_heads",
    "index_head_dim", "index_topk", "max_position_embeddings",
)  # fmt: skip
USED = {
    *SIZES, "model_type", "routed_scaling_factor", "rms_norm_eps", "mlp_layer_types", "first_k_dense_replace",
    "indexer_types", "index_topk_pattern", "index_topk_freq", "index_skip_topk_offset", "indexer_rope_interleave",
    "index_share_for_mtp_iteration", "num_nextn_predict_layers", "rope_theta", "rope_scaling", "rope_parameters",
    "original_max_position_embeddings", "bos_token_id", "eos_token_id", "quantization_config",
}  # fmt: skip

# Checked: the values that the engine honours. None stands for null; an absent key always means the first value.
CHECKED_IN_ALL: dict[str, tuple[Any, ...]] = {  # families that are built of the same experts and attention
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
    "norm_topk_prob": (True,),
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "tie_word_embeddings": (False,),
    "moe_layer_freq": (1,),
    "num_nextn_predict_layers": (0, 1, None),
}
CHECKED = CHECKED_IN_ALL | {
    "partial_rotary_factor": (1, None),
    "rope_interleave": (True,),  # of MLA; the indexer has a key of its own
}
SPARSE_LAYER = ("deepseek_sparse_attention", "indexed_attention")  # what transformers calls it up to 5.17, and in 5.23
CHECKED_BY_RULE = {"num_key_value_heads", "qk_head_dim", "layer_types"}  # against other keys, in `check_sizes`

IRRELEVANT = {
    "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "use_cache", "initializer_range",
    "attention_dropout", "pad_token_id", "ep_size", "aux_loss_alpha", "seq_aux", "pretraining_tp", "_name_or_path",
    "head_dim",  # 64 in GLM's configs: the rope slice, not a head
    "moe_router_dtype",  # the router always runs in fp32
    "output_router_logits", "router_aux_loss_coef", "is_encoder_decoder", "return_dict", "output_hidden_states",
    "output_attentions", "chunk_size_feed_forward", "id2label", "label2id", "problem_type", "num_labels",
    "task_specific_params",
}  # fmt: skip

LAYER_LIMIT = 1024  # a config that asks for 10**12 layers is refused before it can fill the memory
EXPERT_LIMIT = 16384
EXPERTS_IN_ALL = 262_144  # layers x experts, 13 times GLM-5's; 1024 x 16384 would take minutes and 60 GB to plan
PROBLEMS_SHOWN = 40


@dataclass(frozen=True)
class ModelConfig:
    """A DSA model, in the words of its config.json. Lists have one item per main layer; the MTP layer is layer
    `num_hidden_layers` and is not in them: ask `is_sparse` and `has_indexer`."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    n_group: int
    topk_group: int
    routed_scaling_factor: float
    mlp_layer_types: tuple[str, ...]  # "dense" or "sparse"
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    indexer_rope_interleave: bool
    indexer_types: tuple[str, ...]  # "full" or "shared": a shared layer reuses the last full layer's selection
    index_share_for_mtp_iteration: bool
    num_nextn_predict_layers: int | None  # None: the config does not say
    rms_norm_eps: float
    latent_norm_eps: float  # of q_a_layernorm and kv_a_layernorm; see LATENT_NORM_EPS
    max_position_embeddings: int
    rope: Rope
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    scale_fmt: str | None = None  # what quantization_config claims; shown, never believed
    swiglu_limit: float = inf  # gates are at most this, ups within it; these models have no limit
    notes: tuple[str, ...] = ()

    def is_sparse(self, layer: int) -> bool:
        """Whether a layer's MLP is a mixture of experts. The MTP layer's is, unless the model has none at all."""
        if layer >= self.num_hidden_layers:
            return "sparse" in self.mlp_layer_types
        return self.mlp_layer_types[layer] == "sparse"

    def has_indexer(self, layer: int) -> bool:
        """Whether a layer chooses its own tokens. The MTP layer always does."""
        return layer >= self.num_hidden_layers or self.indexer_types[layer] == "full"

    @property
    def softmax_scale(self) -> float:
        """MLA's softmax scale: qk_head_dim^-1/2, times m(mscale_all_dim)^2 under YaRN."""
        m = self.rope.magnitude(self.rope.mscale_all_dim) if self.rope.mscale_all_dim else 1.0
        return (self.qk_nope_head_dim + self.qk_rope_head_dim) ** -0.5 * m * m

    @property
    def rope_scale(self) -> float:
        """What cos and sin are multiplied by, in MLA and in the indexer."""
        rope = self.rope
        if not rope.is_yarn:
            return 1.0
        if rope.attention_factor is not None:
            return rope.attention_factor
        if rope.mscale and rope.mscale_all_dim:
            return rope.magnitude(rope.mscale) / rope.magnitude(rope.mscale_all_dim)
        return rope.magnitude()

    @classmethod
    def load(cls, path: str | Path) -> "ModelConfig":
        """Read config.json, given as a file or as the directory it is in. ConfigError for anything wrong with it."""
        return cls.from_json(*read_config(path))

    @classmethod
    def from_json(cls, raw: bytes, source: str = "config.json") -> "ModelConfig":
        """As `from_dict`, from the bytes of a file; `source` names it in errors."""
        values, notes = parse_config(raw, source)
        return cls.from_dict(values, source, notes)

    @classmethod
    def from_dict(
        cls, values: Mapping[str, Any], source: str = "config.json", notes: tuple[str, ...] = ()
    ) -> "ModelConfig":
        """Build from the contents of a config.json. A ConfigError lists every problem, one line each. `notes`: found
        before, put in front of the others."""
        found = find_model_type(values, source, MODEL_TYPES)
        keys = Keys(values, notes=list(notes))
        sizes = {name: keys.whole(name) for name in SIZES}
        check_sizes(keys, sizes)
        check_layer_types(keys, sizes["num_hidden_layers"])
        for name, accepted in CHECKED.items():
            keys.expect(name, accepted)
        layers = sizes["num_hidden_layers"]
        rms_norm_eps, latent_norm_eps = keys.number("rms_norm_eps"), LATENT_NORM_EPS[found]
        claims = values.get("quantization_config")
        scale_fmt = claims.get("scale_fmt") if isinstance(claims, Mapping) else None
        fields: dict[str, Any] = dict(
            **sizes,
            model_type=found,
            routed_scaling_factor=keys.number("routed_scaling_factor"),
            rms_norm_eps=rms_norm_eps,
            latent_norm_eps=rms_norm_eps if latent_norm_eps is None else latent_norm_eps,
            mlp_layer_types=read_mlp_types(keys, layers),
            indexer_types=read_indexer_types(keys, layers),
            indexer_rope_interleave=keys.flag("indexer_rope_interleave", found == "glm_moe_dsa"),
            index_share_for_mtp_iteration=keys.flag("index_share_for_mtp_iteration", False),
            num_nextn_predict_layers=values.get("num_nextn_predict_layers"),
            rope=read_rope(keys, sizes["max_position_embeddings"]),
            bos_token_id=keys.token("bos_token_id"),
            eos_token_ids=keys.tokens("eos_token_id"),
            scale_fmt=scale_fmt if isinstance(scale_fmt, str) else None,
        )
        known = USED | CHECKED.keys() | CHECKED_BY_RULE | IRRELEVANT
        keys.note_unknown(known | refuse_foreign(keys, known))
        refuse_problems(keys, source)
        return cls(**fields, notes=tuple(keys.notes))


def find_expert_share(c: ModelConfig) -> float:
    """Of a layer's routed experts, those that a token chooses."""
    return c.num_experts_per_tok / c.n_routed_experts


def refuse_problems(keys: Keys, source: str) -> None:
    """ConfigError with every problem that was found, one line each."""
    if keys.problems:
        shown = keys.problems[:PROBLEMS_SHOWN]
        if len(keys.problems) > len(shown):
            shown.append(f"and {len(keys.problems) - len(shown):,} more")
        raise ConfigError.at(source, "this config cannot be run:\n  " + "\n  ".join(shown))


def check_sizes(keys: Keys, sizes: dict[str, int]) -> None:
    """Relations between sizes. A size that was itself refused reads 0 and is in no relation."""
    get = sizes.__getitem__
    keys.limit("num_hidden_layers", get("num_hidden_layers"), LAYER_LIMIT)
    keys.limit("n_routed_experts", get("n_routed_experts"), EXPERT_LIMIT)
    if get("num_hidden_layers") * get("n_routed_experts") > EXPERTS_IN_ALL:
        found, most = get("n_routed_experts"), EXPERTS_IN_ALL // get("num_hidden_layers")
        keys.refuse("n_routed_experts", found, f"expected at most {most} with so many layers")
    heads, nope, rope = get("num_attention_heads"), get("qk_nope_head_dim"), get("qk_rope_head_dim")
    if heads:
        keys.expect("num_key_value_heads", (heads, None), "num_attention_heads: MLA has one key per head")
    if nope and rope:
        keys.expect("qk_head_dim", (nope + rope, None), "qk_nope_head_dim + qk_rope_head_dim")
    if rope % 2:
        keys.refuse("qk_rope_head_dim", rope, "expected an even number: RoPE turns pairs")
    if 0 < get("index_head_dim") < rope:
        keys.refuse("index_head_dim", get("index_head_dim"), f"expected at least qk_rope_head_dim = {rope}")
    experts, groups, chosen = get("n_routed_experts"), get("n_group"), get("topk_group")
    if experts and groups and (experts % groups or (groups > 1 and experts // groups < 2)):
        keys.refuse("n_routed_experts", experts, f"expected equal groups of at least 2 experts in n_group = {groups}")
    elif experts and groups and chosen:
        if chosen > groups:
            keys.refuse("topk_group", chosen, f"expected at most n_group = {groups}")
        elif get("num_experts_per_tok") > chosen * (experts // groups):
            reachable = chosen * (experts // groups)
            keys.refuse("num_experts_per_tok", get("num_experts_per_tok"), f"expected at most {reachable} (topk_group)")


def check_layer_types(keys: Keys, layers: int) -> None:
    """All layers are of one kind, under one of its names."""
    types, layers = keys.values.get("layer_types"), min(layers, LAYER_LIMIT)
    if types is not None and types not in ([name] * layers for name in SPARSE_LAYER):
        keys.refuse("layer_types", types, f"expected {' or '.join(SPARSE_LAYER)} for each layer")


def read_mlp_types(keys: Keys, layers: int) -> tuple[str, ...]:
    """mlp_layer_types, else first_k_dense_replace dense layers and the rest sparse."""
    if keys.values.get("mlp_layer_types") is not None:
        return keys.choices("mlp_layer_types", ("dense", "sparse"), layers)
    if keys.values.get("first_k_dense_replace") is None:
        keys.problems.append("mlp_layer_types, first_k_dense_replace: neither is given; expected one of them")
        return ()
    dense = min(keys.whole("first_k_dense_replace", least=0), layers)
    return ("dense",) * dense + ("sparse",) * (min(layers, LAYER_LIMIT) - dense)


def read_indexer_types(keys: Keys, layers: int) -> tuple[str, ...]:
    """IndexShare: indexer_types wins over index_topk_pattern ("FSSF"), which wins over freq and offset.

    With a frequency, a layer shares iff max(layer - offset + 1, 0) % freq != 0. Engines disagree on the offset of a
    config that lacks it; 2 is what transformers takes.
    """
    values, kinds = keys.values, ("full", "shared")
    pattern = values.get("index_topk_pattern")
    freq = keys.whole("index_topk_freq", default=1)
    offset = keys.whole("index_skip_topk_offset", least=0, default=2)
    if values.get("indexer_types") is not None:
        types = keys.choices("indexer_types", kinds, layers)
    elif isinstance(pattern, str):
        types = keys.choices("index_topk_pattern", kinds, layers, {"F": "full", "S": "shared"})
    elif pattern is not None:
        types = keys.choices("index_topk_pattern", kinds, layers)
    else:
        shares = (max(i - offset + 1, 0) % max(freq, 1) != 0 for i in range(min(layers, LAYER_LIMIT)))
        types = tuple(kinds[is_shared] for is_shared in shares)
    if types and types[0] != "full":
        keys.problems.append("indexer_types: layer 0 shares a selection, but no layer comes before it; expected full")
    return types
