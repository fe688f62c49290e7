"""Keys that change other models and are no part of these: refused unless their value is neutral.

An engine that passes over `attn_factor` or `swiglu_limit` answers with other numbers than the one that multiplies by
it, and nothing says so. What a key does is what published models and the engines that run them take it for
(transformers, vLLM, SGLang, MLX; DeepSeek-V4, GLM-5.3-Flash, Gemma, Granite, MiniCPM, gpt-oss, LongCat, Mistral). null
and false are neutral always, and a list or object is if all in it is. Keys that change nothing where a finished model
answers are listed, so that they make no noise. Next: model.py, which asks.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from saccade.config.keys import Keys, read_number

KEY_LIMIT = 100  # characters of a key that is looked up; real ones have up to 40


class Foreign(NamedTuple):
    """What keys that match `pattern` do, and the values with which they do nothing. A name among the values stands for
    the value of that key in the same config."""

    pattern: re.Pattern[str]
    neutral: tuple[float | str, ...]
    effect: str
    is_on: bool = False  # false is not neutral: the key names something that is done here
    is_word: bool = False  # the neutral values are words, and no other key's name


def _foreign(pattern: str, effect: str, *neutral: float | str, is_on: bool = False, is_word: bool = False) -> Foreign:
    return Foreign(re.compile(pattern), neutral, effect, is_on, is_word)


# The first that matches decides.
TOP_LEVEL = (
    _foreign(r".*soft_?cap(ping)?", "caps logits", 0),
    _foreign(r"swiglu_.*|.*_act_limit|.*_clamp(_value|_limit)?|clip_qkv|gelu_limit", "clamps activations", 0),
    _foreign(r"use_(sliding_window|swa|local_attention)", "limits attention to near tokens", 0),
    _foreign(r"(.*_)?(sliding|attention|local)_window(_size)?|window_size|attention_chunk_size",
             "limits attention to near tokens", 0, -1),
    _foreign(r"query_pre_attn_scalar", "scales attention", "qk_head_dim"),
    _foreign(r"attention_multiplier|(softmax|attn|attention|qk)_scale", "scales attention", "softmax_scale"),
    _foreign(r"attn_temperature_tuning|attention_temperature.*|use_logn_attn|floor_scale", "scales attention", 0),
    _foreign(r"dim_model_base", "scales logits", "hidden_size"),
    _foreign(r"scale_depth", "scales the residual stream", "sqrt(num_hidden_layers)"),
    _foreign(r".*_multipliers?|logits?_scal(e|ing)|output_(multiplier_)?scale|lm_head_scale|width_scale|mup_.*",
             "scales activations", 1),
    _foreign(r"scale_emb(edding)?|embed(ding)?s?_scale|residual_scale|normalize_embeddings?", "scales activations", 1),
    _foreign(r"mla_scale_.*", "scales latents"),
    _foreign(r"routed_scaling_factors|(moe_)?(router|gate)_(scale|scaling_factor|temperature)", "scales experts", 1),
    _foreign(r"(add|use|enable|has)_((?!expert|router|gate|score).)*bias(_.*)?|(.*_)?(qkv|q|k|v|o|out|dense|head|mlp|ffn|linear|conv)_bias|bias",
             "adds biases", 0),
    _foreign(r"(use_)?qk_(layer)?_?norm|use_qk_.*norm|q_norm|k_norm", "normalises queries and keys", 0),
    _foreign(r"(use_)?(sandwich|post|peri)_?(layer)?_?norms?|add_post_.*norm", "adds norms", 0),
    _foreign(r"norm_eps|rms_eps|rmsnorm_eps", "is added inside of norms", "rms_norm_eps"),
    _foreign(r"zero_centered_gamma|apply_layernorm_1p|(rms_?)?norm_(unit_)?offset", "adds 1 to norms", 0),
    _foreign(r"(use_)?parallel_(residual|attn|attention|block)", "runs attention beside the MLP", 0),
    _foreign(r"mhc(_.*)?|use_(hyper_connections?|mhc)", "keeps several residual streams", 0),
    _foreign(r"hc_mult|n(um)?_(residual_)?streams|num_hyper_connections|hyper_connection_rate",
             "keeps several residual streams", 0, 1),
    _foreign(r"hc_.*|hyper_.*", "mixes residual streams", 0),
    _foreign(r"compress_.*|index_kpool.*|o_groups|o_lora_rank|linear_attn_config", "replaces the attention", 0),
    _foreign(r"(num|n)_hash_layers", "routes tokens by a hash", 0),
    _foreign(r"index(er)?_.*", "changes which tokens are looked at"),
    _foreign(r".*attention_sinks?(_.*)?|attn_sinks?|sinks?", "adds attention sinks", 0),
    _foreign(r"(.*_)?att(n|ention)_(output_)?gate|gated_attention", "gates attention", 0),
    _foreign(r"num_(loops|recurrences|ut_steps)|total_ut_steps|loop_(num|count)", "repeats layers", 0, 1),
    _foreign(r"num_kv_shared_layers|use_cla|cla_share_factor|cross_layer_.*", "shares keys between layers", 0, 1),
    _foreign(r"zero_expert_num|num_(zero|copy|constant|null)_experts", "adds experts that compute nothing", 0),
    _foreign(r"moe_latent_.*", "runs experts on latents", 0),
    _foreign(r"num_(local_)?experts|moe_num_experts", "is another number of experts", "n_routed_experts"),
    _foreign(r"num_experts_per_token|moe_(topk|top_k|k)|moe_router_topk", "is another number of chosen experts",
             "num_experts_per_tok"),
    _foreign(r"(moe_)?num_shared_experts", "is another number of shared experts", "n_shared_experts"),
    _foreign(r"decoder_sparse_step|interleave_moe_layer_step", "makes other layers sparse", 1),
    _foreign(r"mlp_only_layers", "makes other layers dense"),
    _foreign(r"rotary_pct|rotary_percent|rope_ratio|rope_percent|rope_scale|rope_factor", "turns RoPE otherwise", 1),
    _foreign(r"rotary_base|rope_base|rotary_emb_base", "turns RoPE otherwise", "rope_theta"),
    _foreign(r"rotary_dim|rope_dim|rotary_embedding_dim", "turns RoPE otherwise", "qk_rope_head_dim"),
    _foreign(r"rope_.*|rotary_.*|use_mrope|mrope_.*|use_dynamic_ntk|.*ntk.*", "turns RoPE otherwise", 0, 1),
    _foreign(r"(mla_)?use_nope|nope_layer.*|no_rope_layer.*", "leaves RoPE out", 0),
    _foreign(r"(use_)?alibi.*", "adds ALiBi", 0),
    _foreign(r"pos(ition)?(al)?_(embedding|encoding)s?(_type)?", "places tokens otherwise",
             "rope", "rotary", "none", is_word=True),
    _foreign(r"llama_4_scaling.*", "scales queries by position", 0),
    _foreign(r"ngram_.*|engram_.*|emb_neighbor_num|emb_split_num", "adds n-gram embeddings", 0),
    _foreign(r"pruned_heads", "takes heads away"),
    _foreign(r"is_decoder|add_cross_attention", "is another architecture", 0, 1),
)  # fmt: skip
# Inside rope_scaling and rope_parameters any number that is not known is refused: there is nothing harmless there.
ROPE = (
    _foreign(r"attn_factor|attention_scale|.*_mscale", "multiplies cos and sin", 1),
    _foreign(r"extrapolation_factor", "is the share of unstretched frequencies", 1),
    _foreign(r"alpha|rope_ratio|rotary_pct|rope_percent|.*_factor|scale|scaling", "turns RoPE otherwise", 1),
    _foreign(r"llama_4_scaling_beta|.*beta", "scales queries by position", 0),
    _foreign(r"apply_yarn_scaling|apply_scale|(rope_)?interleaved?", "turns RoPE otherwise", 1, is_on=True),
    _foreign(r".*", "is not known here, and each number of RoPE changes the model"),
)
ROPE_HARMLESS = frozenset({"finetuned", "max_position_embeddings"})  # of no effect in the engines that read YaRN

# Of training, of tokenisers, of generation (other files say it), of how other engines run: nothing to be noted.
HARMLESS = re.compile(
    r"_.*|.*(dropout|drop|pdrop|drop_rate|layerdrop)|.*(loss|aux|z_loss)(_.*)?|init(ializer)?_.*|.*_init(_.*)?|(.*_)?init_std"
    r"|gradient_checkpointing.*|.*_update_(rate|speed)|label_smoothing.*|pretraining_.*|ep_.*|mtp_.*loss.*|seq_aux"
    r"|.*_token_(id|ids|index)|(bos|eos|pad|unk|sep|cls|mask)_token|tokenizer_.*|model_max_length|seq(uence)?_length"
    r"|max_(new_)?(length|tokens)|min_(new_tokens|length)|do_sample|early_stopping|num_(beams|beam_groups|return_sequences)"
    r"|temperature|top_[kp]|typical_p|(repetition|length|diversity|encoder_no_repeat|no_repeat)_(penalty|ngram_size)"
    r"|encoder_no_repeat_ngram_size|bad_words_ids|(begin_)?suppress_tokens|forced_.*|exponential_decay_length_penalty"
    r"|remove_invalid_values|renormalize_logits|return_dict.*|output_(attentions|hidden_states|scores|router_logits|past)|prefix|finetuning_task|torchscript|use_bfloat16"
    r"|tf_legacy_loss|cross_attention_hidden_size|tie_encoder_decoder|use_(flash_attn|fused_.*|kernels?.*|cache)"
    r"|(attn|experts)_implementation|expert_dtype|params_dtype|quantization|compression_config|kv_cache_.*|unsloth_.*"
    r"|transformers_.*|.*_version|language_only|max_window_layers|layernorm_compute_.*|enable_.*_overlap|.*_parallel_size"
)  # fmt: skip


def refuse_foreign(keys: Keys, known: Any) -> set[str]:
    """Refuse the keys of a config's top level that are not in `known` and change the model; the keys that need no
    note."""
    quiet: set[str] = set()
    values = keys.values
    for name, value in values.items():
        if name in known or not isinstance(name, str) or len(name) > KEY_LIMIT:
            continue
        if HARMLESS.fullmatch(name):
            quiet.add(name)
            continue
        rule = next((rule for rule in TOP_LEVEL if rule.pattern.fullmatch(name)), None)
        if rule is None:
            continue
        if _is_neutral(value, rule, values) or _is_off(name, values):
            quiet.add(name)
        elif not isinstance(value, str) or says_what(value, rule):
            keys.refuse(name, value, explain_rule(rule))
    return quiet


def refuse_foreign_rope(keys: Keys, known: Any) -> set[str]:
    """The same inside of rope_scaling or rope_parameters."""
    quiet: set[str] = set()
    for name, value in keys.values.items():
        if name in known or not isinstance(name, str) or len(name) > KEY_LIMIT:
            continue
        rule = next(rule for rule in ROPE if rule.pattern.fullmatch(name))
        if name in ROPE_HARMLESS or _is_neutral(value, rule, keys.values):
            quiet.add(name)
        elif not isinstance(value, str) or says_what(value, rule):
            keys.refuse(name, value, explain_rule(rule))
    return quiet


def explain_rule(rule: Foreign) -> str:
    """What is expected instead: for a message."""
    shown = " or ".join([*(n if isinstance(n, str) else f"{n:g}" for n in rule.neutral), "no such key"])
    return f"{rule.effect}, expected {shown}"


def says_what(value: str, rule: Foreign) -> bool:
    """Whether a text says what the key does: a number or a flag in quotes, or one of a key whose values are words. Any
    other text is noted."""
    return rule.is_word or unquote(value) is not value


def unquote(value: Any) -> Any:
    """A number, true or false that stands in quotes, as some writers of configs leave them; anything else as it is."""
    if not isinstance(value, str):
        return value
    flag = {"true": True, "false": False, "none": None, "null": None}.get(value.strip().lower(), value)
    if flag is not value:
        return flag
    number = read_number(value)
    return value if number is None else number


def _is_neutral(value: Any, rule: Foreign, values: Mapping[str, Any]) -> bool:
    if rule.is_word and isinstance(value, str):
        return value.lower() in rule.neutral
    if rule.is_on and unquote(value) is False:
        return False
    return is_neutral(value, [_find(n, values) for n in rule.neutral])


def is_neutral(value: Any, neutral: Sequence[float | str | None]) -> bool:
    """Whether a value does nothing: null, false, one of `neutral` within rounding, or made of such values only."""
    value = unquote(value)
    if value is None or value is False:
        return True
    if isinstance(value, Mapping):
        return all(is_neutral(v, neutral) for v in value.values())
    if isinstance(value, list):
        return all(is_neutral(v, neutral) for v in value)
    if isinstance(value, int | float):  # true is 1
        return any(isinstance(n, int | float) and _is_close(value, n) for n in neutral)
    return False


def _is_close(value: float, other: float) -> bool:
    try:
        return math.isclose(value, other, rel_tol=1e-6)
    except OverflowError:  # an integer beyond every float
        return False


def _find(neutral: float | str, values: Mapping[str, Any]) -> float | None:
    """A neutral value as a number; None if the config lacks what it is made of."""
    if not isinstance(neutral, str):
        return neutral

    def get(name: str) -> float:
        value = values.get(name)
        return value if isinstance(value, int | float) and 0 < value < 1e30 else 0

    width = get("qk_nope_head_dim") + get("qk_rope_head_dim")
    made = {
        "qk_head_dim": width,
        "softmax_scale": width**-0.5 if width else 0,
        "sqrt(num_hidden_layers)": get("num_hidden_layers") ** 0.5,
    }
    return made.get(neutral, get(neutral)) or None


def _is_off(name: str, values: Mapping[str, Any]) -> bool:
    """Whether a window is switched off by its own flag, or is no smaller than the context."""
    if "window" not in name or name.startswith("use_"):
        return False
    value, most = unquote(values.get(name)), values.get("max_position_embeddings")
    if values.get("use_sliding_window") is False:
        return True
    return isinstance(value, int) and isinstance(most, int) and value >= most
