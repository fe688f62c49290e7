"""Codes and scales that share an element of their tensor are judged by what they mean: 4-bit codes, packed exponents."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from independent_codec import Made, decode, floats, make, random_tensor, write
from layouts import config_of, read_layouts

import saccade.inspect.blocks as blocks
import saccade.inspect.contents as contents
from saccade.checkpoint.open import open_model
from saccade.errors import Problem
from saccade.inspect.contents import check_contents
from saccade.inspect.findings import Contents
from saccade.inspect.stored import Codings

LAYOUTS = read_layouts()
DOWN = "model.layers.1.mlp.experts.0.down_proj."  # [256, 192]
KV = "model.layers.{}.self_attn.kv_a_proj_with_mqa."  # [448, 256]
WK = "model.layers.1.self_attn.indexer.wk."  # [64, 256]


def make_small(layout: str) -> Made:
    return make(LAYOUTS[layout], config_of(LAYOUTS[layout], small=True))


def check(root: Path, layout: str, made: Made) -> Contents:
    return check_contents(*open_model(write(root / "m", config_of(LAYOUTS[layout], small=True), made.tensors)))


def of(found: tuple[Problem, ...], name: str) -> list[tuple[str, str]]:
    return [(p.kind, p.text) for p in found if p.name == name]


# Four E8M0 exponents to a word; a row of 256 numbers has 2, and 2 that fill up the word.

PACKED = "19-fp8-packed-ue8m0"
BYTES: dict[str, tuple[dict[tuple[int, int], int], bool, list[tuple[str, str]], list[tuple[str, str]]]] = {
    # bytes set in the scale [448, 4]; whether the codes under [7, 1] are zero; problems, notes
    "a NaN": ({(300, 1): 0xFF, (309, 0): 0xFF}, False, [("bad-scale", "scales that are NaN or infinite: 2, first at [300, 1]")], []),
    "a NaN that fills up a word": ({(3, 2): 0xFF, (9, 3): 0xFF}, False, [], []),
    "outliers": ({(7, 1): 200, (447, 0): 1}, False, [], [("outlier", "2^12 from the median 2^-8: 2, first at [7, 1]")]),
    "one of them over zeros": ({(7, 1): 200, (447, 0): 1}, True, [], [("outlier", "2^12 from the median 2^-8: 1, first at [447, 0]")]),
    "one over zeros": ({(7, 1): 0}, True, [], []),
    "zeros that fill up words": ({(i, j): 0 for i in range(448) for j in (2, 3)}, False, [], []),
}  # fmt: skip


@pytest.mark.parametrize("buffer", [None, 5 * 37 * 4])  # pieces that begin inside a row
@pytest.mark.parametrize("cases", [list(BYTES)[:3], list(BYTES)[3:]], ids=" and ".join)
def test_packed_exponents_are_judged_as_scales(
    cases: list[str], buffer: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each case in a layer of its own: in small pieces, looking at a checkpoint takes two seconds."""
    if buffer is not None:
        monkeypatch.setattr(contents, "READ_BUFFER", buffer)
        monkeypatch.setattr("saccade.inspect.scan.ROW_BYTES", 50)
        monkeypatch.setattr(blocks, "SCALE_PIECE", 5 * 4)
    made = make_small(PACKED)
    for layer, case in enumerate(cases):
        values, are_zero, _, _ = BYTES[case]
        scale = made.tensors[KV.format(layer) + "weight_scale_inv"].data.view("u1").reshape(448, 4)
        scale[:] = 119  # 2^-8
        for at, value in values.items():
            scale[at] = value
        if are_zero:
            made.tensors[KV.format(layer) + "weight"].data[7, 128:] = 0x80
    found = check(tmp_path, PACKED, made)
    for told, column in ((found.problems, 2), (found.notes, 3)):
        for layer, case in enumerate(cases):
            mine, expected = of(told, KV.format(layer) + "weight_scale_inv"), BYTES[case][column]
            assert len(mine) == len(expected), case
            for (kind, text), (wanted_kind, part) in zip(mine, expected, strict=True):
                assert kind == wanted_kind and part in text, case
        assert len(told) == sum(len(BYTES[case][column]) for case in cases)  # of other tensors, nothing


# 4-bit codes.

ZEROS = {  # layout, name of the codes, bytes that mean zero only, and one that does not
    "NVFP4": ("05-nvfp4-everywhere", "weight", (0x00, 0x80, 0x08, 0x88), 0x10),
    "NVFP4 compressed-tensors": ("07-nvfp4-fp8-compressed-tensors", "weight_packed", (0x00, 0x88), 0x01),
    "MXFP4": ("09-mxfp4-quark", "weight", (0x00, 0x80), 0x07),
    "INT4 W4AFP8": ("17-w4afp8", "weight", (0x00,), 0x08),
    "INT4 compressed-tensors": ("13-int4-fp8-compressed-tensors", "weight_packed", (0x88,), 0x80),
}


@pytest.mark.parametrize("form", ZEROS)
def test_codes_that_all_mean_zero_are_a_problem(form: str, tmp_path: Path) -> None:
    layout, leaf, zeros, other = ZEROS[form]
    made = make_small(layout)
    raw = made.tensors[DOWN + leaf].data.view("u1")
    raw[:] = np.resize(np.array(zeros, "u1"), raw.shape)
    found = check(tmp_path / "a", layout, made)
    assert [(p.kind, p.name) for p in found.problems] == [("all-zero", DOWN + leaf)]
    raw[-1, -1] = other
    assert check(tmp_path / "b", layout, made).problems == ()


def test_bytes_of_zero_that_mean_minus_eight_are_a_note(tmp_path: Path) -> None:
    layout = "13-int4-fp8-compressed-tensors"
    made = make_small(layout)
    made.tensors[DOWN + "weight_packed"].data[:] = 0
    found = check(tmp_path / "a", layout, made)
    expected = "[256, 24] holds nothing but bytes of zero: each number is -8 times its scale"
    assert found.problems == () and of(found.notes, DOWN + "weight_packed") == [("all-alike", expected)]
    made.tensors[DOWN + "weight_packed"].data[255, 23] = 1
    assert check(tmp_path / "b", layout, made).notes == ()


@pytest.mark.parametrize("form", [f for f in ZEROS if not f.startswith("MX")])  # an exponent is never zero
def test_a_zero_scale_matters_only_over_codes_that_mean_something(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "DECODED_AT_ONCE", 1000)
    layout, leaf, zeros, other = ZEROS[form]
    made = make_small(layout)
    name = next(DOWN + s for s in ("weight_scale", "weight_scale_inv") if DOWN + s in made.tensors)
    scale, raw = made.tensors[name].data, made.tensors[DOWN + leaf].data.view("u1")  # [256, 96]
    scale[200, 1] = 0
    group = 192 // scale.shape[1] // 2 if scale.shape[1] > 2 else 64  # bytes
    raw[200, group : 2 * group] = zeros[0]
    assert check(tmp_path / "a", layout, made).problems == ()
    raw[200, group] = other
    found = check(tmp_path / "b", layout, made)
    assert [(p.kind, p.name, p.text) for p in found.problems] == [
        ("bad-scale", name, "zero scales: 1, first at [200, 1]")
    ]


FORMS = {
    f"{rule.value}, {rule.tensors[1].dtype} {','.join(rule.tensors[1].dims)}": rule
    for layout in LAYOUTS.values()
    for rule in layout.rules
    if rule.value
}


@pytest.mark.parametrize("form", sorted(FORMS))
def test_the_upcast_of_wk_is_measured_in_every_encoding(form: str, tmp_path: Path) -> None:
    """The range is that of what codes are multiplied by, global scale and all, without what fills up a word."""
    rule, made, shape = FORMS[form], make_small("03-bf16"), (64, 256)
    stored = {t.leaf: random_tensor(t, shape, rule, np.random.default_rng(3)) for t in rule.tensors}
    for name, raw in stored.items():
        if raw.dtype == "I32" and name.startswith("weight_scale"):
            raw.data.view("u1").reshape(64, 4)[:, 2:] = 250
    del made.tensors[WK + "weight"]
    made.tensors.update((WK + leaf, raw) for leaf, raw in stored.items())
    found = check(tmp_path, "03-bf16", made)
    (upcast,) = [u for u in found.upcasts if u.tensor == WK + "weight"]
    exact = torch.from_numpy(decode(rule, stored, shape)).double()
    error = ((exact.bfloat16().double() - exact) / exact).abs().nan_to_num().max()
    assert upcast.rounding == pytest.approx(float(error), rel=1e-5)
    steps = [*zip(rule.value.split()[1::2], rule.value.split()[2::2], strict=True)]
    scales = [floats(stored[leaf]).astype(np.float64) for _, leaf in steps]
    if stored[steps[0][1]].dtype == "I32":
        scales[0] = scales[0][:, :2]
    product = scales[0] if len(scales) == 1 else scales[0] * scales[1] if steps[1][0] == "*" else scales[0] / scales[1]
    assert upcast.least_scale == pytest.approx(product.min(), rel=1e-6)
    assert upcast.largest_scale == pytest.approx(product.max(), rel=1e-6)
    assert upcast.is_power_of_two == all((np.frexp(s)[0] == 0.5).all() for s in scales)
    assert found.problems == ()


@pytest.mark.parametrize(("by", "is_power_of_two"), [(0.25, True), (0.75, False)])
def test_a_global_scale_decides_too_whether_the_upcast_is_exact(
    by: float, is_power_of_two: bool, tmp_path: Path
) -> None:
    made = make_small("05-nvfp4-everywhere")
    made.tensors[WK + "weight_scale"].data[:] = 0x38  # 1
    made.tensors[WK + "weight_scale_2"].data[...] = by
    (upcast,) = [u for u in check(tmp_path, "05-nvfp4-everywhere", made).upcasts if u.tensor == WK + "weight"]
    assert (upcast.least_scale, upcast.largest_scale, upcast.is_power_of_two) == (by, by, is_power_of_two)


@pytest.mark.parametrize("form", ["weight_scale_2", "weight_scale"])
def test_a_packed_wk_that_is_accused_already_is_accused_once(form: str, tmp_path: Path) -> None:
    """Its product is not finite, but the reason has a name."""
    made = make_small("05-nvfp4-everywhere")
    made.tensors[WK + form].data[...] = math.nan if form == "weight_scale_2" else 0x7F
    found = check(tmp_path, "05-nvfp4-everywhere", made)
    assert [(p.kind, p.name) for p in found.problems] == [("bad-scale", WK + form)]


@pytest.mark.parametrize(
    ("layout", "leaf", "code", "factor", "inside"),
    [
        ("05-nvfp4-everywhere", "weight_scale_2", 0x70, 2.0**126, 2.0**125),  # 6 * 1 * 2^126
        ("07-nvfp4-fp8-compressed-tensors", "weight_global_scale", 0x70, 2.0**-126, 2.0**-125),
        ("18-int8", "weight_scale", 0x7F, 2.0**122, 2.0**121),
        ("17-w4afp8", "weight_scale_inv", 0x80, 2.0**125, 2.0**124),  # -8
    ],
)
def test_a_code_that_its_scales_take_beyond_bf16_is_a_problem(
    layout: str, leaf: str, code: int, factor: float, inside: float, tmp_path: Path
) -> None:
    made = make_small(layout)
    module, at = (WK, 5) if DOWN + leaf not in made.tensors else (DOWN, 200)
    codes = next(module + n for n in ("weight", "weight_packed") if module + n in made.tensors)
    if leaf in ("weight_scale_2", "weight_global_scale"):
        made.tensors[module + "weight_scale"].data[:] = 0x38  # 1
        made.tensors[module + leaf].data[...] = inside
    else:
        made.tensors[module + leaf].data[at] = inside
    made.tensors[codes].data.view("u1")[at] = code
    assert check(tmp_path / "a", layout, made).problems == ()
    made.tensors[module + leaf].data[made.tensors[module + leaf].data == np.float32(inside)] = factor
    found = check(tmp_path / "b", layout, made)
    assert [(p.kind, p.name) for p in found.problems] == [("not-finite", codes)]
    assert "exceeds the range of BF16 under some of its scales: " in found.problems[0].text


def test_an_offset_of_codes_must_be_zero(tmp_path: Path) -> None:
    made = make_small("18-int8")
    sound = check(tmp_path / "a", "18-int8", made)
    assert sound.problems == sound.notes == ()
    made.tensors[WK + "weight_offset"].data[3] = 1
    found = check(tmp_path / "b", "18-int8", made)
    assert [(p.kind, p.name) for p in found.problems] == [("offset", WK + "weight_offset")]


def test_every_layout_is_sound_as_it_is_made(tmp_path: Path) -> None:
    """Nothing is accused that is only packed, and nothing is left unjudged."""
    for layout in LAYOUTS.values():
        if not layout.is_refused:
            found = check(tmp_path / layout.name, layout.name, make_small(layout.name))
            assert found.problems == found.notes == (), layout.name


def test_int4_of_128_columns_is_not_taken_for_int8(tmp_path: Path) -> None:
    """[256, 128] numbers, two to a byte and a scale for each row, look like [256, 64] in INT8 per channel."""
    layout = LAYOUTS["17-w4afp8"]
    small = config_of(layout, small=True) | {"moe_intermediate_size": 128}
    config, index = open_model(write(tmp_path, small, make(layout, small).tensors))
    codings = Codings.of(config, index)
    for name in (DOWN + "weight", DOWN + "weight_scale_inv"):
        assert codings.name_of(index.entries[name]) == "INT4 g128 W4AFP8"
    assert codings.find_nibbles(index.entries[DOWN + "weight"]) == "int4"
