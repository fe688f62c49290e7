"""Marks of raw bytes against torch's own conversion of each number, in one go and cut into runs."""

import math

import numpy as np
import pytest
import torch

import saccade.inspect.scan as scan
from saccade.inspect.scan import Mark, Marks, median_exponent, merge_marks, scan_scales, scan_values

TORCH = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu, "U8": torch.float8_e8m0fnu,
}  # fmt: skip


def numbers(raw: np.ndarray, dtype: str) -> list[float]:
    return torch.from_numpy(raw.copy()).view(TORCH[dtype]).double().tolist()


def where(found: list[bool]) -> Mark | None:
    return Mark(sum(found), found.index(True)) if any(found) else None


def in_runs(how: object, raw: np.ndarray, dtype: str, size: int) -> Marks:
    marks: Marks = {}
    for at in reversed(range(0, len(raw), size)):  # threads bring them in any order
        merge_marks(marks, how(raw[at : at + size], dtype, at))  # type: ignore[operator]
    return marks


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"])
def test_numbers_that_are_not_finite_are_counted_and_found(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "SCAN_CHUNK", 64)
    dice = np.random.default_rng(0)
    hits = 0
    for trial in range(30):
        raw = dice.integers(0, 256, 512, dtype="u1")
        if trial % 3:  # mostly small numbers: bad ones are few, on either side of zero
            small = torch.randn(512 // TORCH[dtype].itemsize, generator=torch.Generator().manual_seed(trial)).to(
                TORCH[dtype]
            )
            raw = small.view(torch.uint8).numpy().copy()
        if trial % 3 == 1:
            values = torch.from_numpy(raw).view(TORCH[dtype]).double()
            values[int(dice.integers(len(values)))] = [math.nan, -math.nan, math.inf, -math.inf][trial % 4]
            raw = values.to(TORCH[dtype]).view(torch.uint8).numpy()
        expected = where([not math.isfinite(v) for v in numbers(raw, dtype)])
        hits += expected is not None
        assert scan_values(raw, dtype, 0).get("not-finite") == expected
        assert in_runs(scan_values, raw, dtype, 128).get("not-finite") == expected
    assert 10 <= hits < 30


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_both_nan_codes_of_e4m3_are_seen_and_no_other(code: int) -> None:
    raw = np.arange(256, dtype="u1")
    assert scan_values(raw, "F8_E4M3", 0)["not-finite"] == Mark(2, 0x7F)
    assert "not-finite" not in scan_values(raw[(raw & 0x7F) != 0x7F], "F8_E4M3", 0)
    assert scan_values(np.array([1, code, 2], dtype="u1"), "F8_E4M3", 0)["not-finite"] == Mark(1, 1)


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F8_E4M3", "I8", "I32", "BOOL"])
def test_only_zeros_are_zero(dtype: str) -> None:
    zeros = np.zeros(1024, dtype="u1")
    assert "nonzero" not in scan_values(zeros, dtype, 0)
    for at in range(0, 1024, 101):  # whichever byte of a number it is
        raw = zeros.copy()
        raw[at] = 1
        assert "nonzero" in scan_values(raw, dtype, 0)


def test_numbers_below_zero_are_not_zero() -> None:
    for dtype in ("F32", "BF16", "F8_E4M3"):
        assert "nonzero" in scan_values((-torch.ones(64)).to(TORCH[dtype]).view(torch.uint8).numpy(), dtype, 0)


def test_minus_zero_is_zero() -> None:
    for dtype in ("F32", "BF16", "F8_E4M3"):
        raw = (-torch.zeros(64)).to(TORCH[dtype]).view(torch.uint8).numpy()
        assert raw.any() and "nonzero" not in scan_values(raw, dtype, 0)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0", "U8"])
def test_each_sort_of_scale_is_counted_and_found(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "SCAN_CHUNK", 64)
    dice = np.random.default_rng(1)
    seen: set[str | int] = set()
    for trial in range(10):
        raw = dice.integers(0, 256, 512, dtype="u1")
        if trial % 2 and dtype != "U8":
            raw = (
                torch.tensor(dice.choice([0, -1, 1, 0.5, 3, 2**-6, 0.7], 64)).to(TORCH[dtype]).view(torch.uint8).numpy()
            )
        values = numbers(raw, dtype)
        positive = [math.isfinite(v) and v > 0 for v in values]
        expected: dict[str | int, Mark | None] = {
            "not-finite": where([not math.isfinite(v) for v in values]),
            "zero": where([v == 0 for v in values]),
            "negative": where([v < 0 for v in values]),
            "rough": where([p and math.frexp(v)[0] != 0.5 for p, v in zip(positive, values, strict=True)]),
        }
        for e in {math.floor(math.log2(v)) for p, v in zip(positive, values, strict=True) if p}:
            expected[e] = where([p and 2.0**e <= v < 2.0 ** (e + 1) for p, v in zip(positive, values, strict=True)])
        expected = {sort: mark for sort, mark in expected.items() if mark is not None}
        assert scan_scales(raw, dtype, 0) == expected
        assert in_runs(scan_scales, raw, dtype, 128) == expected
        seen |= expected.keys()
    assert {"not-finite"} <= seen and ("zero" in seen) == (dtype not in ("F8_E8M0", "U8"))


def test_the_median_is_that_of_the_positive_scales() -> None:
    assert median_exponent({"zero": Mark(9, 0), -3: Mark(2, 0), 5: Mark(1, 3), 7: Mark(1, 4)}) == -3
    assert median_exponent({-3: Mark(1, 0), 5: Mark(3, 3)}) == 5
    assert median_exponent({"zero": Mark(9, 0)}) is None
