"""What a run of bytes says about the numbers in it. Integers are compared; nothing is decoded.

The sign of a float is its highest bit and its magnitude is ordered as its other bits are, so the largest value of the
bytes seen as signed integers and the largest seen as unsigned ones tell whether a NaN or an infinity is among them, and
whether all are zero: two reductions, 12 GB/s on one core. Positions are looked for only where there is something.
Scales are few (1 in 16,384 codes, or 1 in 16) and are looked at as numbers. Knows no files. Next: contents.py.
"""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch

from saccade.checkpoint.read import TORCH_DTYPES
from saccade.kernels.codes import NIBBLES

Array = np.ndarray[Any, Any]

ROW_BYTES = 64 << 10  # the same for bytes of which each needs an index of 4 bytes
SCAN_CHUNK = 256 << 10  # bytes looked at at once: they stay in the cache, and temporaries stay below 4 MiB


class Float(NamedTuple):
    """A float format: bytes, and the least magnitude that is no finite number, as an integer."""

    size: int
    infinity: int


FLOAT_BITS = {
    "F64": Float(8, 0x7FF0_0000_0000_0000), "F32": Float(4, 0x7F80_0000), "F16": Float(2, 0x7C00),
    "BF16": Float(2, 0x7F80), "F8_E4M3": Float(1, 0x7F), "F8_E5M2": Float(1, 0x7C),
}  # fmt: skip
INTEGERS = {"BOOL": 1, "U8": 1, "I8": 1, "U16": 2, "I16": 2, "U32": 4, "I32": 4, "U64": 8, "I64": 8}
SCALE_DTYPES = {
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "U8": 1,
}  # U8: E8M0 by another name


class Mark(NamedTuple):
    """How many numbers of a tensor are of some sort, and the position of the first in the flat tensor."""

    total: int
    first: int


Marks = dict[str | int, Mark]  # "not-finite", "nonzero", ...; of scales also the binary exponent


def merge_marks(marks: Marks, more: Mapping[str | int, Mark]) -> None:
    """Add what another run of the same tensor says."""
    for sort, mark in more.items():
        old = marks.get(sort)
        marks[sort] = mark if old is None else Mark(old.total + mark.total, min(old.first, mark.first))


def scan_values(raw: Array, dtype: str, at: int) -> Marks:
    """The "not-finite" numbers among bytes that begin at byte `at` of a tensor; "nonzero" if one is (uncounted)."""
    size = FLOAT_BITS[dtype].size if dtype in FLOAT_BITS else INTEGERS[dtype]
    marks: Marks = {}
    for start in range(0, len(raw), SCAN_CHUNK):
        bits = raw[start : start + SCAN_CHUNK].view(f"u{size}")
        if dtype not in FLOAT_BITS:
            if "nonzero" in marks:
                break
            if bits.max():
                marks["nonzero"] = Mark(1, (at + start) // size)
            continue
        infinity, sign = FLOAT_BITS[dtype].infinity, 1 << (8 * size - 1)
        positive, negative = int(bits.view(f"i{size}").max()), int(bits.max())
        if positive > 0 or negative > sign:
            marks["nonzero"] = Mark(1, 0)
        if positive >= infinity or negative >= sign | infinity:
            bad = (bits & bits.dtype.type(sign - 1)) >= infinity
            merge_marks(marks, {"not-finite": Mark(int(bad.sum()), (at + start) // size + int(bad.argmax()))})
    return marks


def scan_codes(raw: Array, code: str) -> Marks:
    """Of 4-bit codes, two to a byte: "nonzero" if one means something else than zero, "set" if a bit is set (both
    uncounted). The two differ: uint4 spells zero as 8, and e2m1 has a zero below zero."""
    marks: Marks = {}
    is_zero = _zeros(code)
    for start in range(0, len(raw), SCAN_CHUNK):
        part = raw[start : start + SCAN_CHUNK]
        if "nonzero" not in marks and not is_zero[part].all():
            marks["nonzero"] = Mark(1, 0)
        if "set" not in marks and part.any():
            marks["set"] = Mark(1, 0)
        if len(marks) == 2:
            break
    return marks


@lru_cache
def _zeros(code: str) -> Array:
    """Of each byte whether both of its codes mean zero: bool [256]."""
    byte, values = np.arange(256), np.array(NIBBLES[code])
    both: Array = (values[byte & 15] == 0) & (values[byte >> 4] == 0)
    return both


def scan_exponents(raw: Array, at: int, kept: int, width: int) -> Marks:
    """As `scan_scales`, of E8M0 exponents in rows of `width` bytes, of which the first `kept` are scales and the others
    fill up the last word. Positions count scales only."""
    marks: Marks = {}
    for start in range(at, at + len(raw), ROW_BYTES):
        part = raw[start - at : start - at + ROW_BYTES]
        column = (start % width + np.arange(len(part), dtype="i4")) % width
        merge_marks(marks, scan_scales(part[column < kept], "U8", start // width * kept + min(start % width, kept)))
    return marks


def scan_scales(raw: Array, dtype: str, at: int) -> Marks:
    """The scales that are "not-finite", "zero", "negative" or positive, but "rough" (no power of two); and of the
    positive ones how many lie in each binade [2^e, 2^(e+1)), under e."""
    marks: Marks = {}
    for start in range(0, len(raw), SCAN_CHUNK):
        part = raw[start : start + SCAN_CHUNK]
        merge_marks(marks, _scan_chunk(part, dtype, (at + start) // SCALE_DTYPES[dtype]))
    return marks


def _scan_chunk(raw: Array, dtype: str, at: int) -> Marks:
    if SCALE_DTYPES[dtype] == 1:  # at most 256 different numbers
        counts = np.bincount(raw, minlength=256)
        codes = counts.nonzero()[0]
        values, counts = read_scales(codes.astype("u1"), dtype), counts[codes]
    else:
        codes, values = None, read_scales(raw, dtype)
        counts = np.ones(len(values), dtype="i8")

    def mark(mask: Array) -> Mark:
        first = mask.argmax() if codes is None else np.isin(raw, codes[mask]).argmax()
        return Mark(int(counts[mask].sum()), at + int(first))

    with np.errstate(invalid="ignore"):
        sorts = {"not-finite": ~np.isfinite(values), "zero": values == 0, "negative": values < 0}
        mantissa, exponent = np.frexp(values)  # value = mantissa * 2^exponent, 0.5 <= mantissa < 1
        positive = np.isfinite(values) & (values > 0)
        sorts["rough"] = positive & (mantissa != 0.5)
    marks: Marks = {sort: mark(mask) for sort, mask in sorts.items() if mask.any()}
    for e in np.unique(exponent[positive]):
        marks[int(e) - 1] = mark(positive & (exponent == e))
    return marks


def read_scales(raw: Array, dtype: str) -> Array:
    """The numbers of scales, exactly: f32 [n]."""
    if SCALE_DTYPES[dtype] == 1:
        numbers: Array = _table(dtype)[raw]
        return numbers
    if dtype == "BF16":  # the upper half of an F32
        return (raw.view("u2").astype("u4") << 16).view("f4")
    return raw.view("f4") if dtype == "F32" else raw.view("f2").astype("f4")


@lru_cache
def _table(dtype: str) -> Array:
    """The numbers of all 256 codes of a format of one byte: f32 [256]."""
    known = TORCH_DTYPES["F8_E8M0" if dtype == "U8" else dtype]
    numbers: Array = torch.arange(256, dtype=torch.uint8).view(known).float().numpy()
    return numbers


def median_exponent(marks: Marks) -> int | None:
    """The binade of a tensor's median scale; None if it has no positive one."""
    exponents = sorted((e, mark.total) for e, mark in marks.items() if isinstance(e, int))
    half, seen = sum(count for _, count in exponents) / 2, 0
    for e, count in exponents:
        seen += count
        if seen >= half:
            return e
    return None
