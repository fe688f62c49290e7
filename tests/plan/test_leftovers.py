"""What quantisers leave beside a model: ignored by a rule with a reason, and only there where the rule says. Each rule of
checkpoint/leftovers.py has names that it takes and near misses that stay problems."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from coded_matrices import LAYOUTS, entries_of, made_small, plan_small
from independent_codec import Raw, write
from layouts import config_of, specs

from saccade.checkpoint.header import Entry
from saccade.checkpoint.index import Index, read_index
from saccade.checkpoint.leftovers import CHANGES, RULES, Rule, find_leftover
from saccade.convert.changes import Mode, find_items, is_plain
from saccade.errors import LoadError, Problem
from saccade.inspect.contents import check_contents
from saccade.models.dsa.config import ModelConfig
from saccade.models.registry import make_config
from saccade.plan import Plan, check, check_sources, find_leftovers, make_plan, prove
from saccade.plan.explain import explain
from saccade.plan.show import show_plan
from saccade.weights.loader import load

A = "model.layers.1.self_attn."
E = "model.layers.1.mlp.experts.2.up_proj."
MTP = "model.layers.3.self_attn."  # the small models have three layers and this one
K2 = "model.layers.2.self_attn.k_proj."  # where a weight stands
BEYOND = "model.layers.4.self_attn."  # and this one not

# One line for each rule of the table, in its order: names that it takes, near misses that no rule takes.
EXAMPLES: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    ((E + "input_scale", A + "o_proj.act_scale", "lm_head.input_scale_ub", MTP + "indexer.wk.activation_scaling_factor"),
     (BEYOND + "o_proj.input_scale", A + "input_scale", E + "input_scales", "model.layers.1.mlp.experts.2.act_scale")),
    ((E + "input_global_scale", A + "kv_b_proj.output_scale", "model.layers.1.input_layernorm.output_scale",
      E + "output_global_scale"),
     (A + "output_scale", E + "output_scale_2", "model.layers.1.mlp.output_scale")),
    ((E + "input_zero_point", A + "q_a_proj.output_zero_point", A + "o_proj.act_zero_point"),
     (BEYOND + "o_proj.input_zero_point", E + "zero_point")),
    ((E + "input_offset", E + "output_offset", A + "q_b_proj.quant_bias", A + "q_b_proj.deq_scale"),
     (A + "quant_bias", E + "offset", E + "scale")),
    ((E + "input_quantizer._amax", A + "o_proj.output_quantizer._amax"),
     (E + "weight_quantizer._amax", A + "input_quantizer._amax", E + "_amax")),
    ((E + "weight_shape",), (A + "weight_shape",)),
    ((A + "k_scale", A + "v_scale", A + "kv_scale", A + "k_proj.k_scale", A + "v_proj.v_scale", MTP + "attn.k_scale",
      A + "q_scale", A + "p_scale", A + "attn.prob_scale", A + "prob_output_scale", A + "mla_attn.mla_attn.v_scale",
      A + "qkv_proj.k_scale", A + "kv_a_proj_with_mqa.k_scale", A + "indexer.k_scale"),
     (BEYOND + "k_scale", "k_scale", "model.k_scale", E + "k_scale", A + "k_scale.weight", A + "other.k_scale",
      "model.layers.1.mlp.k_scale", "model.layers.01x.self_attn.k_scale", "visual.layers.1.self_attn.k_scale")),
    ((A + "k_cache_scale", A + "v_cache_scale", A + "k_proj.kv_cache_scale", A + "kv_cache_scaling_factor",
      "model.layers.1.attention.kv_cache_scaling_factor"),
     (BEYOND + "kv_cache_scale", "model.layers.1.kv_cache_scaling_factor", A + "kv_cache")),
    ((A + "q_global_scale", A + "k_global_scale", A + "v_global_scale"), ("model.layers.1.k_global_scale",)),
    ((A + "q_zero_point", A + "k_zero_point", A + "v_proj.v_zero_point"), (A + "zero_point", E + "k_zero_point")),
    ((A + "k_cache_offset", A + "v_cache_offset", A + "kv_proj.kv_cache_offset"), (E + "kv_cache_offset",)),
    ((A + "fa_q.scale", A + "fa_k.offset", A + "indexer.fa_v.scale"), (A + "fa_o.scale", A + "scale", E + "fa_q.scale")),
    ((A + "k_bmm_quantizer._amax", A + "softmax_bmm_quantizer._amax"), (A + "bmm_quantizer._amax",)),
    (tuple(f"{A}{p}_proj.{leaf}" for p, leaf in (
        ("k", "weight_scale"), ("v", "weight_scale_inv"), ("qkv", "weight_scale_2"), ("q", "weight_global_scale"),
        ("kv", "weight_zero_point"), ("k", "weight_offset"), ("k", "input_scale"), ("v", "act_scale"),
        ("k", "input_zero_point"), ("k", "input_offset"), ("k", "output_scale"), ("v", "output_zero_point"),
        ("v", "output_offset"), ("q", "input_global_scale"),
     )),
     (K2 + "weight", K2 + "weight_scale", A + "k_proj.scale", BEYOND + "k_proj.weight_scale",
      A + "indexer.k_proj.weight_scale", "model.layers.1.mlp.k_proj.weight_scale", A + "w_proj.weight_scale")),
    ((A + "rotary_emb.inv_freq", "model.rotary_emb.inv_freq", "rotary_emb.original_inv_freq"),
     ("model.rotary.inv_freq", A + "inv_freq", A + "rotary_emb.inv_freq.weight", A + "my_rotary_emb.inv_freq")),
    ((A + "rotary_emb.cos_cached", A + "rotary_emb.sin_cached"), (A + "cos_cached", A + "rotary_emb.tan_cached")),
)  # fmt: skip


def headers(*extra: str, without: str = "", shape: tuple[int, ...] = (), dtype: str = "F32") -> Plan:
    """The published FP8 layout, less what ends with `without`, and more tensors of a shape and dtype."""
    layout = LAYOUTS["01-fp8-deepseek"]
    c = config_of(layout, small=True)
    found = [spec for spec in specs(layout, c) if not (without and spec[0].endswith(without))]
    entries = {name: Entry(name, dtype, shape, "f", 0, 0) for name in extra}
    entries |= {name: Entry(name, dtype, shape, "f", 0, 0) for name, dtype, shape in found}
    return make_plan(ModelConfig.from_dict(c), Index("test", (), entries, (), (), 0))


def problems_of(plan: Plan) -> list[Problem]:
    return [*check(plan), *check_sources([plan])]


@pytest.mark.parametrize(("rule", "examples"), zip(RULES, EXAMPLES, strict=True), ids=lambda x: x[0][0])
def test_a_rule_takes_what_it_names_and_nothing_near(
    rule: Rule, examples: tuple[tuple[str, ...], tuple[str, ...]]
) -> None:
    taken, missed = examples
    assert {name.rpartition(".")[2] for name in taken} == set(rule.leaves)
    plan = headers(*taken, *missed)
    reasons = {i.name: i.reason for i in plan.ignored}
    assert {name: reasons.get(name) for name in taken} == dict.fromkeys(taken, rule.reason)
    assert {p.name for p in problems_of(plan)} == set(missed) and not reasons.keys() & set(missed)
    cube = (4, 1, 4)  # no scale of a cache or of activations has two axes
    wide = headers(*taken, shape=cube)
    assert {i.name for i in wide.ignored} == (set() if rule.is_vector else set(taken))


def test_no_rule_takes_what_a_matrix_needs() -> None:
    """Of every published layout: each tensor with each matrix there, so that only the place could allow it."""
    for name, layout in LAYOUTS.items():
        c = config_of(layout, small=True)
        found = list(specs(layout, c))
        for tensor, _, shape in found:
            leaf = tensor.rpartition(".")[2]
            layers = c.get("text_config", c)["num_hidden_layers"] + 1
            reason = find_leftover(tensor, shape, layers, lambda matrix: True)
            assert (reason is None) == (leaf not in ("input_scale", "input_global_scale", "weight_shape")), tensor
        if not layout.is_refused:
            index = Index(name, (), {n: Entry(n, dtype, shape, "f", 0, 0) for n, dtype, shape in found}, (), (), 0)
            plan = make_plan(make_config(json.dumps(c).encode()), index)
            read = {s.source for s in plan.steps} | {p for s in plan.steps if s.coding for p in s.coding.partners}
            assert not read & {i.name for i in plan.ignored} and problems_of(plan) == []


@pytest.mark.parametrize("module", [A + "indexer.wk.", A + "kv_b_proj.", E])
@pytest.mark.parametrize("leaf", ["weight", "weight_scale_inv"])
def test_a_lost_partner_of_a_matrix_is_a_problem_whatever_stands_beside_it(module: str, leaf: str) -> None:
    plan = headers(module + "input_scale", module + "output_scale", A + "k_scale", without=module + leaf)
    assert module + "weight" in {p.name for p in problems_of(plan)}
    # Of a matrix that got lost, the scales of activations are not explained away.
    assert (module + "input_scale" in {i.name for i in plan.ignored}) == (leaf != "weight")


def test_what_changes_numbers_is_refused_in_words_that_say_so() -> None:
    for leaf, why in CHANGES.items():
        found = problems_of(headers(E + leaf, shape=(8,)))
        assert [(p.name, p.text) for p in found] == [
            (E + leaf, f"{why}: no parameter uses it, because that is not supported; get a conversion without it")
        ]
    [lost] = problems_of(headers("model.layers.9.input_scale"))
    assert "without its weight, model.layers.9.weight, which is not in the checkpoint" in lost.text


def test_cache_scales_of_a_layer_that_the_quantiser_dropped_are_no_mtp_layer() -> None:
    """NVIDIA's exporter drops the MTP layer; its cache scales must not make half a layer of it."""
    layout = LAYOUTS["04-nvfp4-modelopt"]
    tensors = {n: r for n, r in made_small("04-nvfp4-modelopt").tensors.items() if not n.startswith("model.layers.3.")}
    scale = Raw("F32", (), np.array(1.0, "<f4"))
    scales = {f"model.layers.{i}.self_attn.{kv}_proj.{kv}_scale": scale for i in range(4) for kv in "kv"}
    plan = plan_small("04-nvfp4-modelopt", tensors | scales)
    assert not layout.is_refused and problems_of(plan) == [] and not plan.has_mtp
    assert scales.keys() <= {i.name for i in plan.ignored}
    tensors[MTP + "o_proj.weight"] = made_small("04-nvfp4-modelopt").tensors[MTP + "o_proj.weight"]
    assert problems_of(plan_small("04-nvfp4-modelopt", tensors | scales))  # half a layer is still half a layer


def test_plan_folds_them_and_says_why_and_explain_too() -> None:
    scales = [f"model.layers.{i}.self_attn.{kv}_proj.{kv}_scale" for i in range(3) for kv in "kv"]
    plan = headers(*scales, A + "rotary_emb.inv_freq")
    text = show_plan(plan)
    assert re.search(
        r"ignored  6 tensors: scales a quantised cache.*\n +model\.layers\.\{0-2\}\.self_attn\.k_proj\.k_scale\n", text
    )
    assert "rotary frequencies follow from config.json" in text
    assert "is not read: scales a quantised cache" in explain(plan, scales[0])


# Zero points.


def with_zero_point(layout: str, name: str, dtype: str, shape: tuple[int, ...], value: int) -> dict[str, Raw]:
    numbers = {"I8": "i1", "F32": "<f4", "I32": "<i4", "F8_E4M3": "u1", "U8": "u1", "I64": "<i8"}
    tensors = dict(made_small(layout).tensors)
    data = np.zeros(shape, numbers[dtype])
    data.reshape(-1)[-1] = value
    return tensors | {name: Raw(dtype, shape, data)}


WK = "model.layers.0.self_attn.indexer.wk.weight"
X3 = "model.layers.1.mlp.experts.3.up_proj.weight"
POINTS: dict[str, tuple[str, str, str, tuple[int, ...]]] = {
    "INT8, I8": ("18-int8", X3, "I8", (192, 1)),
    "FP8 by blocks, FP8": ("01-fp8-deepseek", WK, "F8_E4M3", (1, 2)),
    "FP8 per channel, F32": ("10-mxfp4-fp8-per-channel", WK, "F32", (64,)),
    "INT4 g128, I8": ("13-int4-fp8-compressed-tensors", X3, "I8", (192, 2)),
    "NVFP4, I64": ("07-nvfp4-fp8-compressed-tensors", X3, "I64", (192, 16)),
}


@pytest.mark.parametrize("case", POINTS)
def test_a_zero_point_is_read_and_must_be_zero(case: str, tmp_path: Path) -> None:
    layout, matrix, dtype, shape = POINTS[case]
    name, config = matrix + "_zero_point", config_of(LAYOUTS[layout], small=True)
    config = ModelConfig.from_dict(config)
    for value in (0, 3):
        tensors = {
            n: r for n, r in with_zero_point(layout, name, dtype, shape, value).items() if n != matrix + "_offset"
        }
        index = read_index(write(tmp_path / str(value), config_of(LAYOUTS[layout], small=True), tensors))
        plan = make_plan(config, index)
        assert prove(plan) == [] and name in plan.zeros
        found = [p.name for p in check_contents(config, index).problems]
        if value:
            with pytest.raises(LoadError, match=f"{name} is not zero: its codes are asymmetric"):
                load(plan)
            assert found == [name]
        else:
            load(plan)
            assert found == []


@pytest.mark.parametrize(
    ("layout", "name", "dtype", "shape"),
    [
        ("13-int4-fp8-compressed-tensors", X3, "I32", (24, 2)),  # packed: zero is 8 in every nibble
        ("13-int4-fp8-compressed-tensors", X3, "U8", (192, 2)),
        ("18-int8", X3, "I8", (192,)),  # beside weight_offset
        ("18-int8", X3, "I8", (96, 1)),
    ],
)
def test_a_zero_point_of_another_spelling_is_refused(
    layout: str, name: str, dtype: str, shape: tuple[int, ...]
) -> None:
    found = problems_of(plan_small(layout, with_zero_point(layout, name + "_zero_point", dtype, shape, 0)))
    assert [(p.kind, p.name) for p in found] == [("encoding", name + "_zero_point")]


# What reads every tensor.


def test_contents_and_conversion_take_them_as_what_they_are(tmp_path: Path) -> None:
    """Zeros and NaN in what nothing reads are notes; I8 offsets of caches do not make a BF16 model a quantised one, and
    what belongs to no matrix is copied, not lost."""
    c = config_of(LAYOUTS["01-fp8-deepseek"], small=True)
    config, tensors = ModelConfig.from_dict(c), made_small("01-fp8-deepseek").tensors
    beside = {
        A + "fa_k.offset": Raw("I8", (2, 1), np.zeros((2, 1), "i1")),
        A + "k_proj.k_scale": Raw("F32", (), np.array(np.nan, "<f4")),
        A + "k_proj.weight_scale": Raw("F32", (), np.array(-1, "<f4")),
        A + "k_bmm_quantizer._amax": Raw("F32", (2,), np.zeros(2, "<f4")),
    }
    gone = {E + "input_scale": Raw("F32", (), np.array(0, "<f4"))}
    index = read_index(write(tmp_path, c, tensors | beside | gone))
    found = check_contents(config, index)
    assert found.problems == () and {p.name for p in found.notes} >= {*beside, *gone}
    plan = make_plan(config, index)
    items = find_items(plan, Mode("bf16"), frozenset())
    assert beside.keys() <= {i.name for i in items} and not gone.keys() & {i.name for i in items}
    assert is_plain(items, find_leftovers(config, index)) and not is_plain(items)
    result = Index("r", (), {i.name: Entry(i.name, i.dtype, i.shape, "f", 0, 0) for i in items}, (), (), 0)
    assert problems_of(make_plan(config, result)) == []
    assert entries_of(tensors).keys() - {i.name for i in items} == {n for n in tensors if n.endswith("_scale_inv")}
