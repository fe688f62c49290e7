"""THE table of tensors that may stay unread, each rule with its reason: quantisers leave them beside a model.

A tensor that no parameter reads is a problem, unless a rule here says why it may stay unread. A rule knows the last
part of the name *and* the place: beside a matrix, in an attention of the model, at a projection that MLA does not have.
No rule names the scale of a weight. So a scale whose matrix got lost stays a problem. CHANGES lists what would change
numbers; it only explains why that is refused. Names only: no torch, no file, no config. Next: plan/lower.py asks.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

Has = Callable[[str], bool]  # whether the checkpoint holds the numbers or codes of the matrix of that name

ATTENTION = re.compile(
    r"model\.layers\.(\d{1,9})\.(?:self_attn|attn|attention)"
    r"(?:\.(?:attn|mla_attn|indexer|wk|wq_b|[qkv]_proj|kv_proj|qkv_proj|q_[ab]_proj|kv_b_proj|kv_a_proj_with_mqa))*"
)
KERNEL = re.compile(ATTENTION.pattern + r"\.fa_[qkv]")
CALIBRATOR = re.compile(ATTENTION.pattern + r"\.(?:[qkv]|kv|pe|softmax)_bmm_quantizer")
ROTARY = re.compile(r"(?:.+\.)?rotary_emb")
ABSENT_PROJECTION = re.compile(r"model\.layers\.(\d{1,9})\.self_attn\.(?:q|k|v|kv|qkv)_proj")
QUANTIZER = re.compile(r"(.+)\.(?:input|output)_quantizer")


class Rule(NamedTuple):
    """Which tensors are left unread, and why that is right."""

    leaves: tuple[str, ...]  # the last part of the name
    place: "re.Pattern[str] | None"  # of what stands before it, whole; None: a matrix `<that>.weight` is there
    reason: str
    is_vector: bool = True  # whether the tensor has at most one axis that is longer than 1


ACTIVATIONS = "scales activations, which stay numbers here: the weight's numbers are the same without it"
SHIFTED = "belongs to quantised activations, which stay numbers here: the weight's numbers are the same without it"
CACHE = "scales a quantised cache or attention, which is not used here: caches hold numbers, or scale themselves"
NO_MATRIX = "belongs to a projection that MLA does not have, and no weight of it is here"
ROTATED = "rotary frequencies follow from config.json"

RULES = (
    # Beside a matrix. AutoFP8: act_scale; ModelOpt, llm-compressor, Quark: input_scale; FBGEMM: input_scale_ub;
    # TensorRT-LLM: activation_scaling_factor; compressed-tensors' NVFP4: input_global_scale. The scale of static
    # activations is for a product of codes by codes; a product of numbers has no use for it.
    Rule(("input_scale", "act_scale", "input_scale_ub", "activation_scaling_factor"), None, ACTIVATIONS),
    Rule(("input_global_scale", "output_scale", "output_global_scale"), None, ACTIVATIONS),
    # Quark, compressed-tensors; then modelslim, which makes quant_bias and deq_scale of the input's offset and scale.
    Rule(("input_zero_point", "output_zero_point", "act_zero_point"), None, SHIFTED),
    Rule(("input_offset", "output_offset", "quant_bias", "deq_scale"), None, SHIFTED),
    Rule(("_amax",), QUANTIZER, SHIFTED),  # ModelOpt before its export
    Rule(("weight_shape",), None, "says what the codes' shape and config.json say"),
    # In an attention: ModelOpt writes k_proj.k_scale, compressed-tensors and Quark self_attn.k_scale, prob_output_scale
    # and k_proj.output_scale, AutoFP8 self_attn.kv_scale, TensorRT-LLM kv_cache_scaling_factor, modelslim the rest.
    Rule(("k_scale", "v_scale", "kv_scale", "q_scale", "p_scale", "prob_scale", "prob_output_scale"), ATTENTION, CACHE),
    Rule(("k_cache_scale", "v_cache_scale", "kv_cache_scale", "kv_cache_scaling_factor"), ATTENTION, CACHE),
    Rule(("q_global_scale", "k_global_scale", "v_global_scale"), ATTENTION, CACHE),
    Rule(("q_zero_point", "k_zero_point", "v_zero_point"), ATTENTION, CACHE),
    Rule(("k_cache_offset", "v_cache_offset", "kv_cache_offset"), ATTENTION, CACHE),
    Rule(("scale", "offset"), KERNEL, CACHE),  # modelslim's fa_quant
    Rule(("_amax",), CALIBRATOR, CACHE),
    # q_proj, k_proj, v_proj: exporters that know no MLA write their scales by the names of other attentions.
    Rule(("weight_scale", "weight_scale_inv", "weight_scale_2", "weight_global_scale", "weight_zero_point",
          "weight_offset", "input_scale", "act_scale", "input_zero_point", "input_offset", "output_scale",
          "output_zero_point", "output_offset", "input_global_scale"), ABSENT_PROJECTION, NO_MATRIX),
    Rule(("inv_freq", "original_inv_freq"), ROTARY, ROTATED),
    Rule(("cos_cached", "sin_cached"), ROTARY, ROTATED, is_vector=False),
)  # fmt: skip

# What would change what a matrix computes. Never ignored: why not, for the message.
INPUT = "is multiplied into the matrix's input before its codes are used"
TURN = "turns the matrix's input, or queries and keys, before they are used"
SECOND = "is a second scale or offset of the codes"
CHANGES = {
    **dict.fromkeys(("pre_quant_scale", "_pre_quant_scale", "prequant_scaling_factor", "smooth", "smoother",
                     "smooth_scale", "smooth_scales", "smooth_factor", "smoothquant_scale"), INPUT),
    **dict.fromkeys(("q_rot", "k_rot", "heads_rotation", "kronecker_rotation", "hadamard_matrix"), TURN),
    **dict.fromkeys(("weight_scale_second", "weight_offset_second", "scale_bias"), SECOND),
    "bias": "is a bias, and the matrices of this model have none",
}  # fmt: skip

_BY_LEAF: dict[str, tuple[Rule, ...]] = {
    leaf: tuple(rule for rule in RULES if leaf in rule.leaves) for rule in RULES for leaf in rule.leaves
}
LEFTOVER_LEAVES = frozenset(_BY_LEAF)
# Half of all tensors are weights' own scales (46,000 in DeepSeek-V3.2), which can only be of an absent projection.
_OF_ABSENT = frozenset(
    leaf for leaf, rules in _BY_LEAF.items() if all(rule.place is ABSENT_PROJECTION for rule in rules)
)
_ABSENT_ENDS = (".q_proj", ".k_proj", ".v_proj", ".kv_proj", ".qkv_proj")
# Those that stand beside a matrix as its own scales do, and go where it goes.
BESIDE = frozenset(leaf for rule in RULES if rule.place is None for leaf in rule.leaves)
SCALE_LEAF_NAMES = frozenset(
    leaf for leaf in LEFTOVER_LEAVES if leaf.endswith(("_scale", "scaling_factor")) and "weight" not in leaf
)


def find_leftover(name: str, shape: tuple[int, ...], layers: int, has: Has) -> str | None:
    """Why a tensor that no parameter reads may stay unread; None if no rule says so. `layers`: of the model, the MTP
    layer included; `has`: whether a matrix, `<module>.weight`, is in the checkpoint."""
    module, _, leaf = name.rpartition(".")
    if leaf in _OF_ABSENT and not module.endswith(_ABSENT_ENDS):
        return None
    for rule in _BY_LEAF.get(leaf, ()):
        if (not rule.is_vector or sum(n != 1 for n in shape) <= 1) and _is_there(rule, module, layers, has):
            return rule.reason
    return None


def _is_there(rule: Rule, module: str, layers: int, has: Has) -> bool:
    if rule.place is None:
        return has(module + ".weight")
    found = rule.place.fullmatch(module)
    if found is None:
        return False
    if rule.place is QUANTIZER:
        return has(found[1] + ".weight")
    if rule.place is ABSENT_PROJECTION and has(module + ".weight"):
        return False
    return rule.place is ROTARY or int(found[1]) < layers
