"""Keys of other models in config.json: what would change the model is refused by name, what is neutral or harmless makes
no noise, what nobody knows is noted with its number."""

from typing import Any

import pytest
from published_configs import deepseek_v32_config, glm5_config

from saccade.config.file import KEYS_LIMIT
from saccade.errors import ConfigError
from saccade.models.dsa.config import PROBLEMS_SHOWN, ModelConfig

YARN = deepseek_v32_config()["rope_scaling"]

# Key -> values that change the model, and values that do not. Widths are DeepSeek-V3.2's: 192 = 128 + 64.
CHANGES: dict[str, tuple[list[Any], list[Any]]] = {
    "swiglu_limit": ([10, 10.0, [7.0]], [0, 0.0, None, False]),
    "swiglu_alpha": ([1.702], [None]),
    "final_logit_softcapping": ([30.0, True, float("nan"), 10**400], [None, 0]),
    "attn_logit_softcap": ([50], [None]),
    "router_logit_softcapping": ([30], [None]),
    "sliding_window": ([128, 4096], [None, 0, -1, 163840, 1 << 30]),
    "attention_chunk_size": ([8192], [None]),
    "logit_scale": ([0.0625], [1, 1.0]),
    "logits_scaling": ([8.0], [1]),
    "embedding_multiplier": ([12.0], [1.0]),
    "residual_multiplier": ([0.22], [1]),
    "ssm_multipliers": ([[1, 1, 0.5]], [[1, 1.0]]),
    "attention_multiplier": ([0.0078125], [192**-0.5]),
    "query_pre_attn_scalar": ([256], [192]),
    "scale_emb": ([12], [1]),
    "dim_model_base": ([256], [7168]),
    "scale_depth": ([1.4], [61**0.5]),
    "mla_scale_q_lora": ([True, 2.0], [False]),
    "use_bias": ([True], [False]),
    "lm_head_bias": ([True], [False]),
    "attention_out_bias": ([True], [None]),
    "use_qk_norm": ([True], [False]),
    "qk_layernorm": ([True, 1], [False]),
    "sandwich_norm": ([True], [False]),
    "norm_eps": ([1e-5], [1e-6]),
    "zero_centered_gamma": ([True], [False]),
    "use_parallel_residual": ([True], [False]),
    "n_streams": ([4], [1, 0]),
    "num_residual_streams": ([2], [1]),
    "hc_mult": ([4], [1]),
    "hc_sinkhorn_iters": ([20], [None]),
    "mhc": ([True], [False]),
    "index_kpool": ([4], [0]),
    "index_new_number": ([1], [None]),
    "compress_ratios": ([[0, 4, 128]], [[0, 0], []]),
    "o_groups": ([8], [0]),
    "linear_attn_config": ([{"num_heads": 8}], [{}]),
    "num_hash_layers": ([3], [0]),
    "attention_sinks": ([True], [False]),
    "attn_output_gate": ([True], [False]),
    "num_kv_shared_layers": ([20], [0]),
    "zero_expert_num": ([128], [0]),
    "num_experts": ([128], [256]),
    "decoder_sparse_step": ([2], [1]),
    "mlp_only_layers": ([[0, 1]], [[]]),
    "rotary_pct": ([0.5], [1.0]),
    "rotary_dim": ([32], [64]),
    "rope_local_base_freq": ([1e4], [None]),
    "no_rope_layers": ([[1, 0]], [[]]),
    "use_alibi": ([True], [False]),
    "rope_interleave": ([False, 1], [True]),
}
ROPE: dict[str, tuple[list[Any], list[Any]]] = {
    "attn_factor": ([0.5, 0, [2]], [1, 1.0, None]),
    "extrapolation_factor": ([0.5, 0], [1.0]),
    "llama_4_scaling_beta": ([0.1], [0]),
    "alpha": ([1000.0], [1]),
    "short_mscale": ([1.2], [1.0]),
    "low_freq_factor": ([4.0], [1.0]),
    "mrope_section": ([[16, 24, 24]], [None]),
    "apply_yarn_scaling": ([False], [True]),
    "new_number": ([1, 0, 0.0], [None]),
    "finetuned": ([], [True, False]),
}


def problems_of(**changes: Any) -> list[str]:
    try:
        config = ModelConfig.from_dict(deepseek_v32_config() | changes)
    except ConfigError as error:
        return str(error).split("\n  ")[1:]
    assert config.notes == ()
    return []


@pytest.mark.parametrize("key", CHANGES)
def test_a_key_that_changes_the_model_is_refused_unless_it_is_neutral(key: str) -> None:
    changing, neutral = CHANGES[key]
    for value in changing:
        (problem,) = problems_of(**{key: value})
        assert problem.startswith(f"{key}: ") and ", found " in problem and len(problem) < 200, value
    for value in neutral:
        assert problems_of(**{key: value}) == [], value


@pytest.mark.parametrize("key", ROPE)
def test_a_number_of_rope_is_refused_unless_it_is_neutral(key: str) -> None:
    changing, neutral = ROPE[key]
    for place in ("rope_scaling", "rope_parameters"):
        for value in changing:
            (problem,) = problems_of(**{"rope_scaling": None, place: YARN | {key: value}})
            assert problem.startswith(f"rope_parameters.{key}: ") and ", found " in problem, value
        for value in neutral:
            assert problems_of(**{"rope_scaling": None, place: YARN | {key: value}}) == [], value


def test_a_number_or_a_flag_in_quotes_is_what_it_says() -> None:
    for key, changing, neutral in (
        ("swiglu_limit", ["10", "1e1", " 0.5 ", ["7.0"]], ["0", "0.0", "false", "none", ["0"]]),
        ("sliding_window", ["128"], ["-1", "163840", "null"]),
        ("use_bias", ["true", "True", "1"], ["False", "0"]),
        ("logit_scale", ["0.0625"], ["1.0"]),
        ("position_embedding_type", ["alibi", "learned", "absolute", "1", True], ["rope", "RoPE", "rotary", None]),
        ("positional_encoding", ["alibi"], ["rotary"]),
    ):
        for value in changing:
            (problem,) = problems_of(**{key: value})
            assert problem.startswith(f"{key}: ") and ", found " in problem, value
        for value in neutral:
            assert problems_of(**{key: value}) == [], (key, value)
    assert problems_of(rope_scaling=YARN | {"attn_factor": "1.0"}) == []
    (problem,) = problems_of(rope_scaling=YARN | {"attn_factor": "0.5"})
    assert 'attn_factor: multiplies cos and sin, expected 1 or no such key, found "0.5"' in problem
    [note] = ModelConfig.from_dict(
        deepseek_v32_config() | {"swiglu_limit": "tuned"}
    ).notes  # no number, so nobody knows
    assert "swiglu_limit" in note


def test_a_window_that_is_switched_off_is_none() -> None:
    assert problems_of(use_sliding_window=False, sliding_window=4096, max_window_layers=28) == []
    assert len(problems_of(use_sliding_window=True, sliding_window=4096)) == 2


def test_what_changes_nothing_where_a_model_answers_makes_no_noise() -> None:
    harmless = {
        "router_z_loss_coef": 1e-3, "mtp_loss_factor": 0.3, "hidden_dropout": 0.1, "init_std": 0.02, "seq_length": 4096,
        "bias_update_speed": 1e-3, "sep_token_id": 5, "tokenizer_class": "X", "model_max_length": 1 << 40, "top_k": 50,
        "temperature": 0.6, "max_length": 20, "_attn_implementation": "sdpa", "unsloth_version": "1", "num_beams": 1,
        "kv_cache_scheme": None, "output_scores": False, "pruned_heads": {}, "is_decoder": True,
    }  # fmt: skip
    assert problems_of(**harmless) == []


def test_a_number_that_nobody_knows_is_noted_with_its_value_and_a_text_by_name() -> None:
    config = ModelConfig.from_dict(glm5_config() | {"new_number": 3, "new_text": "x", "rope_parameters": {
        "rope_theta": 1e6, "rope_type": "default", "factor": 4.0, "new_text": "y"}})  # fmt: skip
    rope, unused, top = config.notes
    assert rope == "1 unknown key ignored: new_text" and top == "2 unknown keys ignored: new_number=3, new_text"
    assert unused == "rope_parameters.factor is not used: the rope_type is default"


def test_a_config_of_too_many_keys_is_refused_and_problems_are_cut() -> None:
    with pytest.raises(ConfigError, match="has 10,0.. keys, expected at most"):
        ModelConfig.from_dict(dict.fromkeys(map(str, range(10_000)), 1) | glm5_config())
    shown = problems_of(**{f"index_{i}": 1 for i in range(KEYS_LIMIT - 100)})
    assert len(shown) == PROBLEMS_SHOWN + 1 and shown[-1] == f"and {KEYS_LIMIT - 100 - PROBLEMS_SHOWN:,} more"
    assert problems_of(**{"use_" + "x" * 10**6 + "bias": None, "index_a\x1b[31m": 1}) == [
        r"index_a\x1b[31m: changes which tokens are looked at, expected no such key, found 1"
    ]
