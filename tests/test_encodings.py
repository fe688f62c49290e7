"""Encodings one at a time: random shapes against an independent decode, cuts, refusals, and the survey's failures."""

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from independent import Made, Raw, decode, make, random_tensor, write
from layouts import Rule, config_of, read_layouts

from saccade.checkpoint.coding import Coding, find_coding
from saccade.checkpoint.header import Entry
from saccade.checkpoint.index import Index, read_index
from saccade.checkpoint.read import TORCH_DTYPES
from saccade.config import ModelConfig
from saccade.errors import CheckpointError, ConfigError, LoadError, Problem
from saccade.kernels import reference as ops
from saccade.kernels.matrix import Matrix
from saccade.plan import Layout, make_plan, prove
from saccade.plan.keep import Cells, find_cells
from saccade.plan.lower import Sources, lower
from saccade.plan.types import Kind, Param, Part, Plan
from saccade.weights import Loader, Weights

LAYOUTS = read_layouts()
RULES = {f"{name}: {rule.value}": rule for name, layout in LAYOUTS.items() for rule in layout.rules if rule.value}
RULES = {str(rule.tensors[1]) + rule.value: rule for rule in RULES.values()}  # each format once
X = "model.layers.1."
WK = "model.layers.0.self_attn.indexer.wk.weight"
EXPERT = X + "mlp.experts.3.up_proj.weight"


def to_torch(raw: Raw) -> torch.Tensor:
    flat = torch.from_numpy(np.frombuffer(raw.data.tobytes(), np.uint8).copy())
    return flat.view(TORCH_DTYPES[raw.dtype]).view(raw.shape)


def entries_of(tensors: dict[str, Raw]) -> dict[str, Entry]:
    return {n: Entry(n, r.dtype, tuple(r.shape), "f", 0, r.data.nbytes) for n, r in tensors.items()}


def plan_param(param: Param, tensors: dict[str, Raw], dtype: str = "auto") -> Plan:
    """A plan of one parameter, without a model around it."""
    index = Index("test", (), entries_of(tensors), (), (), 0)
    config = ModelConfig.from_dict(config_of(LAYOUTS["03-bf16"], small=True))
    return lower([param], config, Sources(index), Layout(), dtype, True, ())


def feed_all(plan: Plan, tensors: dict[str, Raw], dice: random.Random) -> Weights:
    """In a random order, in random pieces, through one buffer that is overwritten."""
    loader, pieces = Loader(plan), []
    for name, raw in tensors.items():
        tensor = to_torch(raw)
        rows = len(tensor) if tensor.ndim else 1
        cuts = (
            sorted({0, rows, *(dice.randrange(rows) for _ in range(dice.choice((0, 1, 2))))}) if tensor.ndim else [0, 1]
        )
        pieces += [(name, tensor[a:b] if tensor.ndim else tensor, a) for a, b in zip(cuts, cuts[1:], strict=False)]
    dice.shuffle(pieces)
    for name, piece, first in pieces:
        buffer = piece.clone()
        loader.feed(name, buffer, first)
        buffer.view(-1).view(torch.uint8).fill_(0xFF)
    return loader.finish()


def values_of(weights: Weights, name: str) -> torch.Tensor:
    return ops.decode(weights.matrix(name))


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(sorted(RULES)),
    st.integers(1, 300),
    st.one_of(st.integers(1, 80), st.sampled_from([127, 128, 129, 192, 448, 512, 576])),
    st.integers(0, 2**32),
    st.data(),
)
def test_any_box_of_any_shape_is_decoded_bit_for_bit(form: str, rows: int, columns: int, seed: int, data: Any) -> None:
    rule, dice = RULES[form], np.random.default_rng(seed)
    rows = data.draw(st.sampled_from([rows, 128, 448, 576]))
    columns = max(columns, 2)  # one number in a byte, or half a byte: [rows, 1] of I8 would be either
    shape = rows, columns
    tensors = {"m." + t.leaf: random_tensor(t, shape, rule, dice) for t in rule.tensors}
    expected = torch.from_numpy(decode(rule, {n[2:]: r for n, r in tensors.items()}, shape))
    top = data.draw(st.integers(0, rows - 1))
    left = data.draw(st.integers(0, columns - 1))
    bottom, right = data.draw(st.integers(top + 1, rows)), data.draw(st.integers(left + 1, columns))
    part = Part("m.weight", shape, ((top, bottom), (left, right)), ((0, bottom - top), (0, right - left)))
    for kind, dtype in ((Kind.BF16, "auto"), (Kind.EXPERTS, "auto"), (Kind.LINEAR, "float32")):
        put = part._replace(put=((0, 1), *part.put)) if kind is Kind.EXPERTS else part
        lead = (1,) if kind is Kind.EXPERTS else ()
        plan = plan_param(Param("p", kind, (*lead, bottom - top, right - left), (put,)), tensors, dtype)
        assert plan.problems == ()
        found = values_of(feed_all(plan, tensors, random.Random(seed)), "p").reshape(bottom - top, right - left)
        wanted = expected[top:bottom, left:right]
        if plan.stored["p"].dtype == "BF16":
            wanted = wanted.bfloat16().float()
        assert torch.equal(found.view(torch.int32), wanted.contiguous().view(torch.int32)), plan.stored["p"]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(RULES)), st.integers(1, 6), st.integers(1, 40), st.integers(0, 2**32), st.data())
def test_stacked_halves_keep_their_own_scales(form: str, n: int, width: int, seed: int, data: Any) -> None:
    """gate over up, n experts, any cut of rows: a global scale for each expert and half."""
    rule, dice = RULES[form], np.random.default_rng(seed)
    rows, columns = data.draw(st.sampled_from([64, 192, 256])), 16 * width
    lo = data.draw(st.sampled_from([0, 32, 1]))
    mine = data.draw(st.integers(1, rows - lo))
    tensors: dict[str, Raw] = {}
    parts, expected = [], []
    for e in range(n):
        for half in range(2):
            module = f"{e}.{half}."
            stored = {t.leaf: random_tensor(t, (rows, columns), rule, dice) for t in rule.tensors}
            tensors.update((module + leaf, raw) for leaf, raw in stored.items())
            put = ((e, e + 1), (half * mine, half * mine + mine), (0, columns))
            parts.append(Part(module + "weight", (rows, columns), ((lo, lo + mine), (0, columns)), put))
            expected.append(torch.from_numpy(decode(rule, stored, (rows, columns)))[lo : lo + mine])
    plan = plan_param(Param("p", Kind.EXPERTS, (n, 2 * mine, columns), tuple(parts)), tensors)
    wanted = torch.cat(expected).view(n, 2 * mine, columns)
    held = plan.stored["p"]
    if held.encoding is None:
        assert "off the borders" in plan.notes[0]
        wanted = wanted.bfloat16().float()
    found = values_of(feed_all(plan, tensors, random.Random(seed)), "p")
    assert torch.equal(found, wanted)
    if rule.value.startswith(("e2m1", "uint4", "int8")) and columns % 8 == 0:
        assert held.encoding is not None  # rows of these may be cut anywhere


def test_a_slice_of_columns_off_a_group_is_upcast_and_says_so() -> None:
    rule = LAYOUTS["04-nvfp4-modelopt"].rules[0]
    tensors = {"m." + t.leaf: random_tensor(t, (8, 64), rule, np.random.default_rng(0)) for t in rule.tensors}
    for left, right, kept in ((16, 48, True), (0, 64, True), (16, 40, False), (8, 48, False), (1, 64, False)):
        part = Part("m.weight", (8, 64), ((0, 8), (left, right)), ((0, 1), (0, 8), (0, right - left)))
        plan = plan_param(Param("p", Kind.EXPERTS, (1, 8, right - left), (part,)), tensors)
        assert (plan.stored["p"].encoding is not None) is kept, (left, right)
        assert kept is (plan.notes == ())
        if not kept:
            assert "1x16 blocks" in plan.notes[0] and f"+{8 * (right - left) * 3 // 2} bytes" in plan.notes[0]


@pytest.mark.parametrize("form", sorted(RULES))
def test_the_expert_op_decodes_what_it_is_given(form: str) -> None:
    """expert_mlp on codes equals expert_mlp on their f32 numbers, bit for bit."""
    rule, dice = RULES[form], np.random.default_rng(1)
    n, mine, hidden = 3, 128, 128
    made: dict[str, Matrix] = {}
    for name, rows, columns, halves in (("gate_up", mine, hidden, 2), ("down", hidden, mine, 1)):
        tensors: dict[str, Raw] = {}
        parts = []
        for e in range(n):
            for h in range(halves):
                stored = {t.leaf: random_tensor(t, (rows, columns), rule, dice) for t in rule.tensors}
                tensors.update((f"{e}.{h}.{leaf}", raw) for leaf, raw in stored.items())
                put = ((e, e + 1), (h * rows, (h + 1) * rows), (0, columns))
                parts.append(Part(f"{e}.{h}.weight", (rows, columns), ((0, rows), (0, columns)), put))
        plan = plan_param(Param(name, Kind.EXPERTS, (n, halves * rows, columns), tuple(parts)), tensors)
        assert plan.stored[name].encoding is not None, plan.notes
        made[name] = feed_all(plan, tensors, random.Random(0)).matrix(name)
    numbers = {name: Matrix(ops.decode(w)) for name, w in made.items()}
    assert all(w.data.isfinite().all() for w in numbers.values())
    dice_t = torch.Generator().manual_seed(0)
    x = torch.randn(7, hidden, generator=dice_t) * 1e-2
    experts = torch.randint(0, n, (7, 2), generator=dice_t)
    weights = torch.rand(7, 2, generator=dice_t)
    found = ops.expert_mlp(x, experts, weights, made["gate_up"], made["down"])
    assert found.isfinite().all() and found.abs().max() > 0
    assert torch.equal(found, ops.expert_mlp(x, experts, weights, numbers["gate_up"], numbers["down"]))


def test_every_code_and_every_exponent_means_what_its_format_says() -> None:
    from independent import e2m1_values, e4m3_values

    byte = torch.arange(256, dtype=torch.uint8)
    e2m1 = torch.tensor(e2m1_values(), dtype=torch.float32)
    pairs = torch.stack([e2m1[(byte & 15).long()], e2m1[(byte >> 4).long()]], 1).flatten()
    assert torch.equal(ops.read_codes(byte[None], "e2m1")[0], pairs)
    low = torch.arange(16, dtype=torch.uint8)[None]  # high nibble 0
    assert ops.read_codes(low, "uint4")[0, ::2].tolist() == list(range(-8, 8))
    assert ops.read_codes(low.view(torch.int8), "int4")[0, ::2].tolist() == [*range(8), *range(-8, 0)]
    assert ops.read_codes(byte.view(torch.int8)[None], "int8")[0].tolist() == [*range(128), *range(-128, 0)]
    word = torch.tensor([[0x76543210, -0x12345679]], dtype=torch.int32)  # 0xEDCBA987
    assert ops.read_codes(word, "uint4")[0].tolist() == [*range(-8, 0), *range(-1, 7)]
    wanted = torch.tensor(e4m3_values(), dtype=torch.float32)
    torch.testing.assert_close(ops.read_codes(byte.view(torch.float8_e4m3fn)), wanted, rtol=0, atol=0, equal_nan=True)
    from saccade.kernels.codes import read_scale

    exponents = torch.tensor([2.0**e for e in range(-127, 128)], dtype=torch.float64).float()
    assert torch.equal(read_scale(byte[:255]), exponents)
    assert read_scale(byte[255:]).isnan().all()
    assert read_scale(torch.tensor([[0x7F7E7D7C]], dtype=torch.int32)).tolist() == [[0.125, 0.25, 0.5, 1.0]]


# The survey's failures, B1 rows 4 to 14 and their neighbours: loaded right, or refused before a tensor byte is read.


def made_small(name: str) -> Made:
    return make(LAYOUTS[name], config_of(LAYOUTS[name], small=True))


def problems_of(name: str, tensors: dict[str, Raw]) -> list[Problem]:
    index = Index("test", (), entries_of(tensors), (), (), 0)
    return prove(make_plan(ModelConfig.from_dict(config_of(LAYOUTS[name], small=True)), index))


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
    from saccade.weights import load

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
        index = Index("test", (), entries_of(tensors), (), (), 0)
        plan = make_plan(ModelConfig.from_dict(config_of(LAYOUTS[layout], small=True)), index)
        ignored = {i.name: i.reason for i in plan.ignored}
        assert ignored.keys() == {n for n in tensors if n.endswith(leaf)}
        assert all(words in reason for reason in ignored.values())


def test_the_format_is_found_by_the_file_and_never_by_the_config() -> None:
    """B1-6 to 8, B2-15 to 18: name lists that say nothing true change nothing."""
    for layout in ("11-fp8-renamed", "09-mxfp4-quark"):
        tensors = made_small(layout).tensors
        c = config_of(LAYOUTS[layout], small=True)
        index = Index("test", (), entries_of(tensors), (), (), 0)
        plans = [
            make_plan(ModelConfig.from_dict(c | {"quantization_config": q}), index)
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


def test_fp8_experts_of_one_scale_each_keep_it_for_each_half() -> None:
    rule = Rule((), LAYOUTS["04-nvfp4-modelopt"].rules[1].tensors, "e4m3 * weight_scale")
    shapes = [(64, 32), (64, 32)]
    tensors = {
        f"{i}.{t.leaf}": random_tensor(t, shape, rule, np.random.default_rng(i))
        for i, shape in enumerate(shapes)
        for t in rule.tensors
    }
    parts = tuple(
        Part(f"{i}.weight", (64, 32), ((0, 64), (0, 32)), ((0, 1), (64 * i, 64 * i + 64), (0, 32))) for i in range(2)
    )
    param = Param("p", Kind.EXPERTS, (1, 128, 32), parts)
    coding = find_coding("0.weight", entries_of(tensors), (64, 32))
    assert isinstance(coding, Coding)
    assert find_cells(param, coding.encoding) == Cells((64, 32), None)
    matrix = feed_all(plan_param(param, tensors), tensors, random.Random(0)).matrix("p")
    assert matrix.scale is not None and matrix.scale.shape == (1, 2, 1) and matrix.group == (64, 32)
    assert matrix.scale[0, 0] != matrix.scale[0, 1]
