"""Checkpoints of GLM-5.3-Flash: what is wrong with one is named before a byte is read, what is not needed is ignored."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from coded_matrices import LAYOUTS
from flash_headers import small_flash_config
from independent_codec import Raw, bf16_bits, make, write
from plans import problems_of
from whole_checkpoints import parameters_of, same

from saccade.checkpoint.open import open_model
from saccade.config.file import Config
from saccade.convert.changes import Mode
from saccade.convert.convert import convert
from saccade.errors import ConfigError
from saccade.models.registry import make_config
from saccade.plan import Plan, make_plan, prove
from saccade.plan.explain import explain
from saccade.plan.show import show_plan

Tensors = dict[str, Raw]
L = "model.language_model.layers."
INDEXER = L + "1.self_attn.indexer."
KDA = L + "0.self_attn."


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    return make(LAYOUTS["23-fp8-flash"], small_flash_config()).tensors


def drop(name: str) -> Callable[[Tensors], object]:
    return lambda t: t.pop(name)


def to_bf16(name: str) -> Callable[[Tensors], object]:
    return lambda t: t.update({name: Raw("BF16", t[name].shape, bf16_bits(t[name].data))})


def transpose(name: str) -> Callable[[Tensors], object]:
    return lambda t: t.update({name: Raw(t[name].dtype, t[name].shape[::-1], t[name].data.T.copy())})


FAULTS: dict[str, tuple[Callable[[Tensors], object], str, str]] = {
    "a lost gate": (drop(INDEXER + "index_kpool_compress_gate"), INDEXER + "index_kpool_compress_gate", "not in the"),
    "a transposed ape": (
        transpose(INDEXER + "index_kpool_compress_ape"), INDEXER + "index_kpool_compress_ape", "transposed"),
    "a lost scale": (
        drop(L + "1.self_attn.q_a_proj.weight_scale_inv"), L + "1.self_attn.q_a_proj.weight", "its scale"),
    "a lost scale of the MTP layer": (
        drop(L + "4.mlp.experts.3.up_proj.weight_scale_inv"), L + "4.mlp.experts.3.up_proj.weight", "its scale"),
    "A_log in BF16": (to_bf16(KDA + "A_log"), KDA + "A_log", "stored as BF16, expected F32"),
    "dt_bias in BF16": (to_bf16(KDA + "dt_bias"), KDA + "dt_bias", "stored as BF16, expected F32"),
    "scales of the streams in BF16": (to_bf16(L + "0.hc_ffn_scale"), L + "0.hc_ffn_scale", "expected F32"),
    "a lost convolution": (drop(KDA + "k_conv1d.weight"), KDA + "k_conv1d.weight", "not in the"),
    "a lost mixer": (drop(L + "3.hc_attn_fn"), L + "3.hc_attn_fn", "not in the"),
    "an indexer with a bias": (
        lambda t: t.update({INDEXER + "wk.bias": t[INDEXER + "k_norm.bias"]}), INDEXER + "wk.bias", "no parameter"),
    "a convolution where none is": (
        lambda t: t.update({L + "1.self_attn.q_conv1d.weight": t[KDA + "q_conv1d.weight"]}),
        L + "1.self_attn.q_conv1d.weight", "no parameter"),
}  # fmt: skip


@pytest.mark.parametrize("case", FAULTS)
def test_a_fault_is_named_before_a_byte_is_read(
    case: str, tensors: Tensors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, name, told = FAULTS[case]
    changed = dict(tensors)
    change(changed)
    problems = problems_of(write(tmp_path, small_flash_config(), changed), monkeypatch)
    assert [p.name for p in problems] == [name] and told in problems[0].text, problems


def plan_of(root: Path) -> Plan:
    plan = make_plan(*open_model(root))
    assert prove(plan) == []
    return plan


def test_the_vision_tower_may_be_there_in_part_or_not_at_all(tensors: Tensors, tmp_path: Path) -> None:
    vision = [name for name in tensors if name.startswith("model.visual.")]
    whole = plan_of(write(tmp_path / "whole", small_flash_config(), tensors))
    assert {i.name for i in whole.ignored} == set(vision) and "prompts with images" in whole.ignored[0].reason
    part = {name: raw for name, raw in tensors.items() if name not in vision[1:]}
    assert [i.name for i in plan_of(write(tmp_path / "part", small_flash_config(), part)).ignored] == vision[:1]
    alone = {name: raw for name, raw in tensors.items() if name not in vision}
    assert plan_of(write(tmp_path / "alone", small_flash_config(), alone)).ignored == ()


def test_scales_of_a_quantised_cache_are_ignored_where_the_model_attends(tensors: Tensors, tmp_path: Path) -> None:
    scale = Raw("F32", (), tensors[KDA + "A_log"].data[:1].reshape(()))
    names = [f"{L}1.self_attn.{leaf}" for leaf in ("k_proj.k_scale", "v_proj.v_scale")]
    plan = plan_of(write(tmp_path, small_flash_config(), tensors | dict.fromkeys(names, scale)))
    assert {i.name for i in plan.ignored} >= set(names)


@pytest.mark.parametrize("kind", ["glm5_next", "glm5_next_text"])
@pytest.mark.parametrize("root", ["model.", "model.language_model."])
def test_a_text_model_alone_is_the_same(kind: str, root: str, tensors: Tensors, tmp_path: Path) -> None:
    """Its keys lie flat in config.json; its names begin with `model.`, or still as in the published files."""
    config = small_flash_config()
    flat = config["text_config"] | {"model_type": kind}
    renamed = {n.replace("model.language_model.", root): raw for n, raw in tensors.items() if ".visual." not in n}
    text = write(tmp_path / "text", flat, renamed)
    assert same(parameters_of(text, "auto"), parameters_of(write(tmp_path / "published", config, tensors), "auto"))


def test_its_plan_and_its_parameters_are_told_by_either_name(tensors: Tensors, tmp_path: Path) -> None:
    plan = plan_of(write(tmp_path, small_flash_config(), tensors))
    shown = show_plan(plan)
    assert "wk | index_kpool_compress_gate | weights_proj (BF16)" in shown
    assert "model.layers.{1,3-4}.self_attn.indexer.wk_gate_weights_proj" in shown
    assert "a request of states" in shown
    name = "layers.1.self_attn.indexer.wk_gate_weights_proj"
    assert explain(plan, "model." + name) == explain(plan, "model.language_model." + name)
    assert "made of 3 parts" in explain(plan, "model." + name)


def test_the_published_fp8_layout_leaves_recurrent_layers_indexers_and_images_in_bf16(
    tensors: Tensors, tmp_path: Path
) -> None:
    """BF16 and back: what is FP8 afterwards is what was, and the lists name modules in both forms."""
    source = write(tmp_path / "a", small_flash_config(), tensors)
    convert(source, tmp_path / "b", Mode("bf16"))
    convert(tmp_path / "b", tmp_path / "c", Mode("fp8"))

    def codes(root: Path) -> set[str]:
        return {e.name for e in open_model(root)[1].entries.values() if e.dtype == "F8_E4M3"}

    assert codes(tmp_path / "b") == set() and codes(tmp_path / "c") == codes(source)
    listed = json.loads((tmp_path / "c" / "config.json").read_text())["quantization_config"]["modules_to_not_convert"]
    assert {f"{root}layers.1.self_attn.kv_b_proj" for root in ("model.", "model.language_model.")} <= set(listed)


def read(change: Callable[[dict[str, Any]], object]) -> Config:
    config = small_flash_config()
    change(config["text_config"])
    return make_config(json.dumps(config).encode())


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("mhc", False, "mhc: supported: true, found false"),
        ("mla_use_nope", False, "mla_use_nope: supported: true"),
        ("index_kpool_compress", False, "index_kpool_compress: supported: true"),
        ("model_type", "llama", "text_config.model_type: expected glm5_next_text"),
        ("linear_attn_config", {"kda_layers": [0, 1]}, r"linear_attn_config.kda_layers: expected the layers"),
        ("linear_attn_config", {"safe_gate": False}, "linear_attn_config.safe_gate: supported: true"),
    ],
)
def test_a_config_that_says_something_else_is_refused(key: str, value: Any, told: str) -> None:
    def change(text: dict[str, Any]) -> None:
        text[key] = text[key] | value if isinstance(value, dict) else value

    assert read(lambda text: None).notes == ()
    with pytest.raises(ConfigError, match=told):
        read(change)
