"""The survey's failures of scales and encodings (B1 rows 4 to 14 and their neighbours): each is loaded right, or refused
by name before a tensor byte is read. And plans that would give codes the wrong scales are no proven plans."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from coded_matrices import LAYOUTS, made_small, plan_small
from independent_codec import Raw, write
from layouts import config_of

from saccade.checkpoint.coding import Coding, find_coding
from saccade.checkpoint.header import Entry
from saccade.checkpoint.index import read_index
from saccade.errors import CheckpointError, ConfigError, LoadError, Problem
from saccade.models.dsa.config import ModelConfig
from saccade.plan import check, make_plan, prove
from saccade.plan.types import LoadStep
from saccade.weights.loader import Loader, load

X = "model.layers.1."
WK = "model.layers.0.self_attn.indexer.wk.weight"
EXPERT = X + "mlp.experts.3.up_proj.weight"


def problems_of(name: str, tensors: dict[str, Raw]) -> list[Problem]:
    return prove(plan_small(name, tensors))


def drop(*leaves: str) -> Callable[[dict[str, Raw]], None]:
    return lambda t: [t.pop(leaf) for leaf in leaves] and None


def alter(name: str, shape: tuple[int, ...], dtype: str) -> Callable[[dict[str, Raw]], None]:
    return lambda t: t.update({name: Raw(dtype, shape, np.zeros(shape, "u1"))})


MODULE = EXPERT.removesuffix("weight")
REFUSED: dict[str, tuple[str, Callable[[dict[str, Raw]], None], str, str]] = {  # layout, what is broken, name, words
    "B1-5: FP8 without its scale": ("11-fp8-renamed", drop(WK + "_scale"), WK, "weight_scale_inv or weight_scale.*mean nothing"),
    "B1-9: MXFP8 without its scale": ("12-mxfp8-nvfp4", drop(WK + "_scale"), WK, "mean nothing"),
    "B1-10: codes in place of BF16": ("03-bf16", alter(WK, (64, 256), "F8_E4M3"), WK, "its scale"),
    "B1-11: INT8 without its scale": ("18-int8", drop(WK + "_scale"), WK, "I8 codes, but its scale"),
    "NVFP4 without its scale": ("05-nvfp4-everywhere", drop(WK + "_scale"), WK, "U8 codes, but its scale"),
    "NVFP4 without its global scale": ("05-nvfp4-everywhere", drop(WK + "_scale_2"), WK, r"global scale \(weight_scale_2\).*mean nothing"),
    "an expert without its global scale": ("07-nvfp4-fp8-compressed-tensors", drop(MODULE + "weight_global_scale"), EXPERT, "global scale"),
    "the global scale of another convention": ("07-nvfp4-fp8-compressed-tensors", lambda t: t.update({EXPERT + "_scale_2": t.pop(EXPERT + "_global_scale")}), EXPERT, r"\(weight_global_scale\)"),
    "an expert without its codes": ("07-nvfp4-fp8-compressed-tensors", drop(EXPERT + "_packed"), EXPERT, "not in the checkpoint"),
    "MXFP4 without its scale": ("09-mxfp4-quark", drop(EXPERT + "_scale"), EXPERT, "its scale"),
    "INT4 without its scale": ("13-int4-fp8-compressed-tensors", drop(EXPERT + "_scale"), EXPERT + "_packed", "its scale"),
    "a scale too much": ("01-fp8-deepseek", alter(WK + "_scale_2", (), "F32"), WK + "_scale_2", "do not need it"),
    "two scales": ("01-fp8-deepseek", alter(WK + "_scale", (1, 2), "F32"), WK + "_scale", "do not need it.*stored twice"),
    "codes twice": ("13-int4-fp8-compressed-tensors", alter(EXPERT, (192, 256), "BF16"), EXPERT + "_packed", "stored twice"),
    "a zero point": ("13-int4-fp8-compressed-tensors", alter(EXPERT + "_zero_point", (24, 2), "I32"), EXPERT + "_zero_point", "only without it"),
    "an order of groups": ("13-int4-fp8-compressed-tensors", alter(EXPERT + "_g_idx", (256,), "I32"), EXPERT + "_g_idx", "only without it"),
    "B1-4: a scale of half the rows": ("10-mxfp4-fp8-per-channel", alter(WK + "_scale", (32,), "F32"), WK + "_scale", r"need .*F32 or BF16 \[64\] or \[64, 1\] \(FP8 per channel\)"),
    "a group of 64": ("13-int4-fp8-compressed-tensors", alter(EXPERT + "_scale", (192, 4), "BF16"), EXPERT + "_scale", r"\[192, 2\] \(INT4 g128"),
    "MXFP4 groups of 16": ("09-mxfp4-quark", alter(EXPERT + "_scale", (192, 16), "U8"), EXPERT + "_scale", r"U8 or F8_E8M0 \[192, 8\] \(MXFP4\)"),
    "B2-40: a block of 64": ("01-fp8-deepseek", alter(WK + "_scale_inv", (1, 4), "F32"), WK + "_scale_inv", r"\[1, 2\] \(FP8 128x128\)"),
    "half of the packed columns": ("09-mxfp4-quark", alter(EXPERT, (192, 64), "U8"), EXPERT, r"config.json says \[192, 256\], as U8 codes \[192, 128\]"),
    "a global scale for each row": ("05-nvfp4-everywhere", alter(WK + "_scale_2", (64,), "F32"), WK + "_scale_2", r"a global scale is F32 \[\] or \[1\]"),
    "E5M2": ("01-fp8-deepseek", alter(WK, (64, 256), "F8_E5M2"), WK, "F8_E5M2, which is no known format.*FP8 128x128"),
    "GPTQ": ("15-awq", lambda t: None, EXPERT, r"qweight \(AWQ or GPTQ codes, I32 \[256, 24\]\), which is not supported.*NVFP4"),
    "an input scale of nothing": ("04-nvfp4-modelopt", alter("model.layers.9.input_scale", (), "F32"), "model.layers.9.input_scale", "without its weight"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_rightly_is_refused_by_name(case: str) -> None:
    layout, break_it, name, words = REFUSED[case]
    tensors = made_small(layout).tensors
    if layout != "15-awq":
        assert problems_of(layout, tensors) == []
    break_it(tensors)
    found = problems_of(layout, tensors)
    assert [p for p in found if p.name == name and re.search(words, p.text)], found
    assert len({p.name.rpartition(".")[0] for p in found}) == (1 if layout != "15-awq" else len(found))  # no flood


def test_an_awq_checkpoint_names_each_matrix_once() -> None:
    found = problems_of("15-awq", made_small("15-awq").tensors)
    assert {p.kind for p in found} == {"encoding"} and len(found) == 2 * 8 * 3
    assert all(p.name.endswith("_proj.weight") for p in found)


def test_a_gguf_directory_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "model-Q4_K.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"model-Q4_K.gguf is GGUF, which is not supported"):
        read_index(tmp_path)


def test_hunyuan_is_refused_by_its_model_type() -> None:
    with pytest.raises(ConfigError, match="hy_v4"):
        ModelConfig.from_dict(config_of(LAYOUTS["21-mxfp8-hunyuan"], small=True) | {"model_type": "hy_v4"})


def test_an_offset_that_is_not_zero_is_refused_by_name_before_any_weight(tmp_path: Path) -> None:
    made = made_small("18-int8")
    name = WK + "_offset"
    made.tensors[name].data[3] = 7.5
    root = write(tmp_path, config_of(LAYOUTS["18-int8"], small=True), made.tensors)
    plan = make_plan(ModelConfig.load(root), read_index(root))
    assert prove(plan) == [] and name in plan.zeros
    assert name in {r.name for r in Loader(plan).needed()[0]}
    with pytest.raises(LoadError, match=f"{name} is not zero.*found up to 7.5"):
        load(plan)


def test_what_is_beside_codes_and_not_used_is_ignored_for_a_reason() -> None:
    for layout, leaf, words in (
        ("04-nvfp4-modelopt", "input_scale", "activations"),
        ("07-nvfp4-fp8-compressed-tensors", "input_global_scale", "activations"),
        ("13-int4-fp8-compressed-tensors", "weight_shape", "config.json"),
    ):
        tensors = made_small(layout).tensors
        plan = plan_small(layout, tensors)
        ignored = {i.name: i.reason for i in plan.ignored}
        assert ignored.keys() == {n for n in tensors if n.endswith(leaf)}
        assert all(words in reason for reason in ignored.values())


def test_the_format_is_found_by_the_file_and_never_by_the_config() -> None:
    """B1-6 to 8, B2-15 to 18: name lists that say nothing true change nothing."""
    for layout in ("11-fp8-renamed", "09-mxfp4-quark"):
        tensors = made_small(layout).tensors
        plans = [
            plan_small(layout, tensors, quantization_config=q)
            for q in (
                {"quant_method": "fp8", "modules_to_not_convert": ["wk", "indexers_proj"]},
                {"exclude": ["*"]},
                {},
            )
        ]
        assert plans[0].steps == plans[1].steps == plans[2].steps


def test_mxfp8_is_never_read_as_blocks_of_128() -> None:
    """B3-40: both are e4m3 with `weight_scale`; the scale's shape and dtype tell."""
    for rows, columns in ((128, 128), (576, 256), (64, 256), (1, 128)):
        grid = (rows, -(-columns // 32))
        entries = {
            "x.weight": Entry("x.weight", "F8_E4M3", (rows, columns), "f", 0, 0),
            "x.weight_scale": Entry("x.weight_scale", "F8_E8M0", grid, "f", 0, 0),
        }
        coding = find_coding("x.weight", entries, (rows, columns))
        assert isinstance(coding, Coding) and coding.encoding.name == "MXFP8"


SCALE, SECOND = X + "mlp.experts.gate_up_proj.scale", X + "mlp.experts.gate_up_proj.global_scale"
WRONG: dict[str, tuple[str, Callable[[list[LoadStep]], list[LoadStep]]]] = {  # target whose steps are changed, how
    "no global scale at all": (SECOND, lambda steps: []),
    "one global scale is missing": (SECOND, lambda steps: steps[:-1]),
    "one scale is missing": (SCALE, lambda steps: steps[:-1]),
    "the global scales of gate and up change places": (SECOND, lambda s: [s[1]._replace(put=s[0].put), s[0]._replace(put=s[1].put), *s[2:]]),
    "the global scales of two experts change places": (SECOND, lambda s: [s[2]._replace(put=s[0].put), s[1], s[0]._replace(put=s[2].put), *s[3:]]),
    "an input scale for a global one": (SECOND, lambda s: [s[0]._replace(source=s[0].source.replace("weight_scale_2", "input_scale")), *s[1:]]),
    "another expert's scales": (SCALE, lambda s: [s[0]._replace(source=s[2].source), *s[1:]]),
    "scales of other rows": (SCALE, lambda s: [s[0]._replace(put=s[1].put), s[1]._replace(put=s[0].put), *s[2:]]),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_packed_experts_without_their_own_scales_are_no_proven_plan(wrong: str) -> None:
    tensors = made_small("04-nvfp4-modelopt").tensors
    plan = plan_small("04-nvfp4-modelopt", tensors)
    assert check(plan) == []
    target, change = WRONG[wrong]
    mine = [s for s in plan.steps if s.target == target]
    assert len(mine) == 16
    steps = (*(s for s in plan.steps if s.target != target), *change(mine))
    found = check(replace(plan, steps=steps))
    assert found and {p.name for p in found} <= {target, X + "mlp.experts.gate_up_proj"}, found


def test_a_decoding_step_needs_both_scales_and_its_offset_looked_at() -> None:
    for layout, change in (
        ("05-nvfp4-everywhere", {"global_scale": None}),
        ("05-nvfp4-everywhere", {"global_scale": X + "self_attn.o_proj.weight_scale_2"}),
        ("05-nvfp4-everywhere", {"scale": X + "self_attn.o_proj.weight_scale"}),
        ("18-int8", {"offset": None}),
        ("18-int8", {}),
    ):
        tensors = made_small(layout).tensors
        plan = plan_small(layout, tensors)
        at = next(i for i, s in enumerate(plan.steps) if s.source == WK)
        step = plan.steps[at]
        assert step.coding is not None and step.op == "dequantize"
        broken = step._replace(coding=step.coding._replace(**change))
        steps = (*plan.steps[:at], broken, *plan.steps[at + 1 :])
        found = check(replace(plan, steps=steps, zeros=plan.zeros if change else ()))
        assert any("wk_weights_proj" in p.name for p in found), (layout, change)
