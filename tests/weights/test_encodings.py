"""Encodings one at a time: boxes and stacks of random shapes against an independent decode, bit for bit."""

import random
import re
from typing import Any

import numpy as np
import pytest
import torch
from coded_matrices import LAYOUTS, RULES, encoded, entries_of, feed_all, plan_param
from hypothesis import given, settings
from hypothesis import strategies as st
from independent_codec import Raw, bf16_bits, decode, e2m1_values, e4m3_values, random_tensor
from layouts import Rule

from saccade.checkpoint.coding import Coding, find_coding
from saccade.kernels import reference as ops
from saccade.kernels.codes import read_scale
from saccade.kernels.types import Matrix
from saccade.models.parameters import Kind, Param, Part
from saccade.plan.keep import Cells, find_cells
from saccade.weights.weights import Weights


def values_of(weights: Weights, name: str) -> torch.Tensor:
    return ops.decode(weights.matrix(name))


@pytest.mark.parametrize("form", sorted(RULES))
@settings(max_examples=12, deadline=None)
@given(
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


@pytest.mark.parametrize("form", sorted(RULES))
@settings(max_examples=8, deadline=None)
@given(st.integers(1, 6), st.integers(1, 40), st.integers(0, 2**32), st.data())
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
    n, mine, hidden = 3, 128, 128
    made = {"gate_up": encoded(form, mine, hidden, 2, n), "down": encoded(form, hidden, mine, 1, n)}
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
    exponents = torch.tensor([2.0**e for e in range(-127, 128)], dtype=torch.float64).float()
    assert torch.equal(read_scale(byte[:255]), exponents)
    assert read_scale(byte[255:]).isnan().all()
    assert read_scale(torch.tensor([[0x7F7E7D7C]], dtype=torch.int32)).tolist() == [[0.125, 0.25, 0.5, 1.0]]


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


NVFP4, MXFP4 = LAYOUTS["04-nvfp4-modelopt"].rules[0], LAYOUTS["09-mxfp4-quark"].rules[0]
UPCAST = {  # rows, columns and format of two parts that lie over one another; why they cannot stay in their codes
    "parts of unequal height": (((32, 64, NVFP4), (48, 64, NVFP4)), "off the borders of its 1x16 blocks"),
    "an odd number of columns": (((32, 33, MXFP4), (32, 33, MXFP4)), "1x32 blocks"),
    "two formats": (((32, 64, NVFP4), (32, 64, MXFP4)), r"stored in several ways \(MXFP4, NVFP4\)"),
    "one part in BF16": (((32, 64, NVFP4), (32, 64, None)), r"stored in several ways \(BF16, NVFP4\)"),
}


@pytest.mark.parametrize("case", UPCAST)
def test_experts_that_cannot_stay_in_their_codes_are_upcast_and_say_why(case: str) -> None:
    pieces, why = UPCAST[case]
    dice, tensors, parts, expected, top = np.random.default_rng(0), {}, [], [], 0
    for i, (rows, columns, rule) in enumerate(pieces):
        shape = rows, columns
        if rule is None:
            number = np.ascontiguousarray(dice.standard_normal(shape), "<f4")
            tensors[f"{i}.weight"] = Raw("BF16", shape, bf16_bits(number).reshape(shape))
            expected.append(torch.from_numpy(number).bfloat16().float())
        else:
            stored = {t.leaf: random_tensor(t, shape, rule, dice) for t in rule.tensors}
            tensors.update((f"{i}.{leaf}", raw) for leaf, raw in stored.items())
            expected.append(torch.from_numpy(decode(rule, stored, shape)).bfloat16().float())
        put = ((0, 1), (top, top + rows), (0, columns))
        parts.append(Part(f"{i}.weight", shape, ((0, rows), (0, columns)), put))
        top += rows
    plan = plan_param(Param("p", Kind.EXPERTS, (1, top, pieces[0][1]), tuple(parts)), tensors)
    assert plan.stored["p"].dtype == "BF16" and len(plan.notes) == 1
    assert re.search(why, plan.notes[0]), plan.notes
    assert torch.equal(values_of(feed_all(plan, tensors, random.Random(0)), "p")[0], torch.cat(expected))
