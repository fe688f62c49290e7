"""ModelConfig: published and transformers' configs read right; everything the engine cannot honour refused by name."""

import dataclasses
import json
import math
import os

import pytest
from published_configs import deepseek_v32_config, glm5_config, glm52_config

from saccade.errors import ConfigError
from saccade.models.dsa.config import CHECKED, IRRELEVANT, SIZES, USED, ModelConfig

PUBLISHED = (deepseek_v32_config, glm5_config, glm52_config)


def read(base=glm5_config, drop=(), **changes):
    return ModelConfig.from_dict({k: v for k, v in {**base(), **changes}.items() if k not in drop})


def refusal(values) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_dict(values)
    return str(caught.value).splitlines()[1:]


@pytest.mark.parametrize("build", PUBLISHED)
def test_published_configs_read_without_a_note(build):
    config = ModelConfig.from_dict(build())
    assert config.notes == ()
    for name in SIZES:
        assert getattr(config, name) == build()[name]
    assert config.num_nextn_predict_layers == 1


def test_deepseek_v32_resolves_to_yarn_and_half_split_indexer():
    config = read(deepseek_v32_config)
    assert config.rope.is_yarn and config.rope.factor == 40 and config.rope.original_max_position == 4096
    m = 0.1 * math.log(40) + 1
    assert config.softmax_scale == pytest.approx(192**-0.5 * m * m)
    assert config.rope_scale == 1.0  # equal mscales cancel
    assert config.indexer_rope_interleave is False
    assert config.indexer_types == ("full",) * 61
    assert config.mlp_layer_types == ("dense",) * 3 + ("sparse",) * 58
    assert config.eos_token_ids == (1,) and config.bos_token_id == 0
    assert config.scale_fmt == "ue8m0"


def test_token_ids_of_other_conventions_are_notes():
    config = read(eos_token_id=[-1, 1.0, "2", None], bos_token_id=-1)
    assert (config.eos_token_ids, config.bos_token_id) == ((1, 2), None)
    told = [note for note in config.notes if "token_id" in note]
    assert told[0] == "bos_token_id: -1 is no token id and is ignored"
    assert told[1:3] == ["eos_token_id: -1 is no token id and is ignored", "eos_token_id: 1.0 is taken as 1"]


def test_glm5_resolves_to_plain_rope_and_interleaved_indexer():
    config = read()
    assert not config.rope.is_yarn and config.rope.theta == 1e6
    assert config.softmax_scale == 256**-0.5 and config.rope_scale == 1.0
    assert config.indexer_rope_interleave is True
    assert config.eos_token_ids == (154820, 154827, 154829) and config.bos_token_id is None
    assert config.scale_fmt is None


def test_glm52_shares_selections_from_21_layers():
    config = read(glm52_config)
    full = [i for i in range(78) if config.has_indexer(i)]
    assert full == [0, 1, *range(2, 78, 4)] and len(full) == 21
    assert config.index_share_for_mtp_iteration
    assert config.has_indexer(78) and config.is_sparse(78)


def test_index_share_precedence_is_types_then_pattern_then_frequency():
    six = dict(num_hidden_layers=6, mlp_layer_types=["dense"] * 6)
    pattern, freq = dict(index_topk_pattern="FSFSFS"), dict(index_topk_freq=4, index_skip_topk_offset=3)
    types = dict(indexer_types=["full"] * 5 + ["shared"])
    assert read(**six, **freq).indexer_types == ("full", "full", "full", "shared", "shared", "shared")
    assert read(**six, **freq, **pattern).indexer_types == ("full", "shared") * 3
    assert read(**six, **freq, **pattern, **types).indexer_types == ("full",) * 5 + ("shared",)
    assert read(**six, index_topk_pattern=["full", "shared"] * 3).indexer_types == ("full", "shared") * 3
    # the published frequency gives the published list; an absent offset is 2, so layer 2 shares
    assert read(glm52_config, drop=["indexer_types"]).indexer_types == read(glm52_config).indexer_types
    assert read(**six, index_topk_freq=4).indexer_types == ("full", "full", "shared", "shared", "shared", "full")


@pytest.mark.parametrize(
    "share", [dict(index_topk_freq=4, index_skip_topk_offset=0), dict(indexer_types=["shared"] * 78)]
)
def test_a_shared_first_layer_is_refused(share):
    assert "layer 0" in refusal({**glm5_config(), **share})[0]


def test_mlp_layer_types_win_over_first_k_dense_replace():
    kinds = ["sparse", "dense"] * 39
    assert read(mlp_layer_types=kinds).mlp_layer_types == tuple(kinds)
    assert read(num_hidden_layers=2).mlp_layer_types == ("dense", "dense")
    assert not read(num_hidden_layers=2).is_sparse(2)  # an MTP layer of a model without experts


def test_interleave_key_wins_over_the_model_type():
    assert read(drop=["indexer_rope_interleave"]).indexer_rope_interleave is True
    assert read(indexer_rope_interleave=False).indexer_rope_interleave is False
    assert read(deepseek_v32_config, indexer_rope_interleave=True).indexer_rope_interleave is True


def test_old_and_new_rope_spellings_give_the_same_config():
    old = deepseek_v32_config()
    scaling, theta = old.pop("rope_scaling"), old.pop("rope_theta")
    new = {("rope_type" if k == "type" else k): v for k, v in scaling.items()}
    expected = ModelConfig.from_dict(deepseek_v32_config())
    assert ModelConfig.from_dict({**old, "rope_parameters": {**new, "rope_theta": theta}}) == expected
    assert ModelConfig.from_dict({**old, "rope_scaling": new, "rope_theta": theta}) == expected


def yarn(**rope):
    base = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 1024}
    return read(deepseek_v32_config, drop=["rope_scaling"], rope_parameters={**base, **rope})


def test_yarn_factors_follow_mscale_or_attention_factor():
    def m(x):
        return 0.1 * x * math.log(4) + 1

    approx, plain = pytest.approx, 192**-0.5
    assert yarn().rope_scale == m(1) and yarn().softmax_scale == plain
    assert yarn(mscale=0.5, mscale_all_dim=2).rope_scale == approx(m(0.5) / m(2))
    assert yarn(mscale=0.5, mscale_all_dim=2).softmax_scale == approx(plain * m(2) ** 2)
    assert yarn(mscale=0.5, mscale_all_dim=0).rope_scale == m(1)
    assert yarn(mscale_all_dim=2).rope_scale == m(1)
    assert yarn(attention_factor=1.25, mscale=1, mscale_all_dim=2).rope_scale == 1.25
    assert yarn(factor=1.0, mscale_all_dim=1).softmax_scale == plain
    assert yarn(factor=None).rope.factor == 163840 / 1024
    assert yarn(truncate=False).rope.truncate is False


def test_absent_rope_theta_is_10000_with_a_note():
    config = read(rope_parameters={"rope_type": "default"})
    assert config.rope.theta == 10000 and "rope_theta" in config.notes[0]


def test_what_transformers_writes_is_read(tmp_path):
    from transformers import DeepseekV32Config, GlmMoeDsaConfig

    written = GlmMoeDsaConfig(num_hidden_layers=8, index_topk_freq=4, index_skip_topk_offset=3, dtype="bfloat16")
    written.save_pretrained(tmp_path)
    config = ModelConfig.load(tmp_path)
    assert config.notes == ()
    assert config.indexer_types == tuple(written.indexer_types)
    assert config.mlp_layer_types == tuple(written.mlp_layer_types)
    assert config.num_nextn_predict_layers is None and config.indexer_rope_interleave is True
    rope = {"rope_type": "yarn", "factor": 8.0, "mscale": 1.0, "mscale_all_dim": 0.7, "rope_theta": 5e4}
    rope["original_max_position_embeddings"] = 512
    DeepseekV32Config(num_hidden_layers=4, rope_parameters=rope).save_pretrained(tmp_path)
    config = ModelConfig.load(tmp_path / "config.json")
    assert config.notes == () and config.rope.mscale_all_dim == 0.7 and config.rope.theta == 5e4
    assert config.indexer_rope_interleave is False


@pytest.mark.parametrize("name", CHECKED)
def test_each_checked_key_is_refused_by_name(name):
    for value in (17, "other", "sigmoid" if name != "scoring_func" else "softmax", [1], {}):
        lines = refusal({**glm5_config(), name: value})
        assert any(line.strip().startswith(f"{name}: supported: ") for line in lines), (value, lines)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (dict(num_key_value_heads=8), "num_key_value_heads"),
        (dict(moe_layer_freq=True), "moe_layer_freq"),
        (dict(norm_topk_prob=1), "norm_topk_prob"),
        (dict(qk_head_dim=192), "qk_head_dim"),
        (dict(layer_types=["full_attention"] * 78), "layer_types"),
        (dict(q_lora_rank=None), "q_lora_rank"),
        (dict(qk_rope_head_dim=63, qk_head_dim=None), "qk_rope_head_dim"),
        (dict(index_head_dim=32), "index_head_dim"),
        (dict(n_group=7), "n_routed_experts"),
        (dict(n_group=256), "n_routed_experts"),
        (dict(topk_group=2), "topk_group"),
        (dict(n_group=64, topk_group=1), "num_experts_per_tok"),
        (dict(mlp_layer_types=["dense"] * 77), "mlp_layer_types"),
        (dict(mlp_layer_types=["dense"] * 77 + ["moe"]), "mlp_layer_types"),
        (dict(indexer_types=["full"] * 79), "indexer_types"),
        (dict(index_topk_pattern="FSX"), "index_topk_pattern"),
        (dict(first_k_dense_replace=None), "first_k_dense_replace"),
        (dict(indexer_rope_interleave=1), "indexer_rope_interleave"),
        (dict(rope_theta=5.0), "rope_parameters.rope_theta"),
        (dict(rope_parameters={"rope_type": "linear", "rope_theta": 1e4}), "rope_parameters.rope_type"),
        (dict(rope_parameters={"factor": 4.0, "rope_theta": 1e4}), "rope_parameters.rope_type"),
        (dict(rope_parameters={"deepseek_sparse_attention": {"rope_theta": 1e4}}), "one RoPE"),
        (dict(rope_parameters={"rope_type": "yarn", "factor": 0.5}), "rope_parameters.factor"),
        (dict(rope_parameters={"rope_type": "yarn", "beta_fast": 1, "beta_slow": 2}), "rope_parameters.beta_fast"),
        (dict(rope_parameters={"partial_rotary_factor": 0.5, "rope_theta": 1e4}), "partial_rotary_factor"),
        (dict(rope_parameters={"rope_type": "yarn", "beta_slow": 1e-320}), "rope_parameters.beta_slow"),
        (dict(rope_parameters={"rope_type": "yarn", "beta_fast": 1e30}), "rope_parameters.beta_fast"),
        (dict(rope_parameters={"rope_type": "yarn", "factor": 1e30}), "rope_parameters.factor"),
        (dict(rope_parameters={"rope_type": "yarn", "mscale_all_dim": 1e30}), "rope_parameters.mscale_all_dim"),
        (dict(rope_parameters={"rope_type": "yarn", "attention_factor": 1e-30}), "rope_parameters.attention_factor"),
        (dict(rope_parameters={"rope_theta": 1 + 1e-15}), "rope_parameters.rope_theta"),
        (dict(rope_parameters=[1]), "rope_parameters"),
        (dict(num_hidden_layers=2**31 - 1), "num_hidden_layers"),
        (dict(n_routed_experts=2**30), "n_routed_experts"),
        (dict(num_hidden_layers=78, n_routed_experts=4096), "n_routed_experts: expected at most 3360"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(changes, named):
    assert any(named in line for line in refusal({**glm5_config(), **changes}))


HOSTILE = [True, "7", 0, -1, 1.5, math.nan, math.inf, 10**400, [], {}, None, [1], "x" * 10**6]


@pytest.mark.parametrize("name", SIZES)
def test_a_size_must_be_a_positive_whole_number(name):
    for value in HOSTILE:
        lines = refusal({**glm5_config(), name: value})
        assert any(line.strip().startswith(f"{name}: expected a whole number") for line in lines), value
        assert all(len(line) < 300 for line in lines)
    assert any(line.strip().startswith(f"{name}: absent") for line in refusal(without(name)))


def without(name):
    return {k: v for k, v in glm5_config().items() if k != name}


def test_hostile_values_anywhere_never_escape_as_another_error():
    for build in PUBLISHED:
        for name in USED | CHECKED.keys() | IRRELEVANT:
            for value in HOSTILE:
                try:
                    ModelConfig.from_dict({**build(), name: value})
                except ConfigError as e:
                    assert len(str(e)) < 5000
        for inner in ("factor", "type", "mscale", "beta_fast", "rope_theta", "truncate", "attention_factor"):
            for value in HOSTILE:
                try:
                    ModelConfig.from_dict({**build(), "rope_parameters": {"rope_type": "yarn", inner: value}})
                except ConfigError as e:
                    assert "rope" in str(e)


@pytest.mark.parametrize("name", ["routed_scaling_factor", "rms_norm_eps"])
def test_a_factor_must_be_finite_and_positive(name):
    for value in HOSTILE:
        if value != 1.5 or isinstance(value, bool):
            assert any(name in line for line in refusal({**glm5_config(), name: value})), value


def test_all_problems_come_at_once_one_line_each():
    lines = refusal({**glm5_config(), "hidden_size": "big", "scoring_func": "softmax", "rms_norm_eps": 0})
    assert len(lines) == 3


def test_unknown_keys_fold_into_one_note():
    config = read(**{f"new_key_{i}": i for i in range(12)})
    assert len(config.notes) == 1 and config.notes[0].startswith("12 unknown keys ignored: new_key_0")


def test_quantization_config_decides_nothing():
    for value in ({"quant_method": "quark", "exclude": ["*"]}, "fp8", [], {"scale_fmt": 3}):
        config = read(quantization_config=value)
        assert dataclasses.replace(config, scale_fmt=None) == dataclasses.replace(read(), scale_fmt=None)


@pytest.mark.parametrize("found", ["hy_v4", None, 3, ["deepseek_v32"]])
def test_another_model_is_refused_by_what_was_found(found):
    with pytest.raises(ConfigError, match="model_type is .*; supported: deepseek_v32, glm_moe_dsa"):
        ModelConfig.from_dict({**glm5_config(), "model_type": found})


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[]", b"\xff\xfe\x00", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}", b"3"]
)
def test_a_broken_file_is_one_config_error(tmp_path, raw):
    (tmp_path / "config.json").write_bytes(raw)
    with pytest.raises(ConfigError, match=r"config\.json"):
        ModelConfig.load(tmp_path)


def test_what_is_no_regular_file_is_named_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    # a writer lets a reader that opens the pipe come back instead of waiting for ever
    with open(os.open(tmp_path / "config.json", os.O_RDWR), "wb") as pipe:
        pipe.write(b"{")
        pipe.flush()
        os.set_blocking(pipe.fileno(), False)
        with pytest.raises(ConfigError, match=r"config\.json: not a regular file"):
            ModelConfig.load(tmp_path)


@pytest.mark.parametrize("path", ["a" * 5000, "nul\0byte", "~no-such-user-at-all/x"])
def test_a_path_that_the_system_refuses_is_a_config_error(path):
    with pytest.raises(ConfigError, match="cannot be read"):
        ModelConfig.load(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.json: no such file"):
        ModelConfig.load(tmp_path)


def test_a_config_is_frozen_and_survives_a_file(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(glm52_config()))
    config = ModelConfig.load(tmp_path)
    assert config == ModelConfig.from_dict(glm52_config()) and hash(config)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.vocab_size = 3


@pytest.mark.parametrize("name", ["deepseek_sparse_attention", "indexed_attention"])
def test_both_names_of_transformers_for_a_sparse_layer_are_known(name: str) -> None:
    layers = deepseek_v32_config()["num_hidden_layers"]
    ModelConfig.from_dict(deepseek_v32_config() | {"layer_types": [name] * layers})
    with pytest.raises(ConfigError, match="layer_types"):
        ModelConfig.from_dict(deepseek_v32_config() | {"layer_types": [name] * (layers - 1) + ["full_attention"]})
