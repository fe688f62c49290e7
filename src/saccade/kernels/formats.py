"""Formats that kernels read: codes and scales become numbers in registers, exactly.

The product of a 4-bit float and its e4m3 scale is exact in FP16. The product of any code and a power of two is exact in
BF16. Tensor cores get those products. Reference: codes.py says what the codes mean. Next: moe/grouped_gemm.py,
moe/packed.py.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.kernels.types import Matrix

# Where the scale of a group goes.
NOWHERE, SUM, END, NUMBER = (tl.constexpr(i) for i in range(4))


class Format(NamedTuple):
    """A Matrix [E, rows, columns] of experts, as kernels take it."""

    codes: Tensor  # bf16, fp8, i8, or u8 holding two numbers each: [E, rows, stored columns]
    scale: Tensor  # floats, e4m3, or u8 exponents: [E, rows of groups, groups]
    second: Tensor  # f32 [E, runs], a global scale; or empty
    columns: int
    form: dict[str, int | str | bool]  # constants of the kernel
    is_fp16: bool  # whether FP16 is what the numbers are exact in, not BF16

    @property
    def is_packed(self) -> bool:
        return self.codes.dtype == torch.uint8


def read_format(w: Matrix) -> Format | None:
    """None for what kernels do not read: f32, odd groups."""
    data, none = w.data, w.data.new_empty(0, dtype=torch.float32)
    if data.ndim != 3 or not data.is_contiguous():
        return None
    if w.scale is None:
        if data.dtype != torch.bfloat16:
            return None
        return Format(data, none, none, data.shape[2], _form("plain", NOWHERE), False)
    is_packed = w.code in ("e2m1", "int4", "uint4")
    codes = data.view(torch.uint8) if is_packed else data
    columns = codes.shape[2] * (2 if is_packed else 1)
    scale = (
        w.scale if w.scale.is_floating_point() and w.scale.dtype != torch.float8_e8m0fnu else w.scale.view(torch.uint8)
    )
    is_exponent = scale.dtype == torch.uint8
    rows, width = min(w.group[0], data.shape[1]), w.group[1]
    if not scale.is_contiguous() or columns % 16 or (w.code == "int8") != (data.dtype == torch.int8 and not is_packed):
        return None
    if width >= columns and scale.shape[2] == 1:
        where = END
    elif width == 128:
        where = SUM
    elif width in (16, 32) and rows == 1:
        where = NUMBER
    else:
        return None
    if where is NUMBER and not is_exponent and scale.dtype != torch.float8_e4m3fn:
        return None
    second = none if w.global_scale is None else w.global_scale.flatten(1).contiguous()
    runs = second.shape[1] if second.numel() else 1
    form = _form(
        w.code, where, rows, min(width, 128), is_exponent, data.shape[1] // runs if second.numel() else 0, w.divides
    )
    is_fp16 = not (where is NUMBER and (is_exponent or w.code == "e4m3"))
    return Format(codes, scale, second, columns, form, is_fp16)


def _form(
    code: str, where: tl.constexpr, rows: int = 1, width: int = 128, is_exponent: bool = False, run: int = 0,
    divides: bool = False,
) -> dict[str, int | str | bool]:  # fmt: skip
    return {
        "CODE": code, "WHERE": where.value, "ROWS": rows, "WIDTH": width, "EXPONENT": is_exponent, "RUN": run,
        "DIVIDES": divides,
    }  # fmt: skip


@triton.jit
def read_nibbles(nibbles, CODE: tl.constexpr, dtype: tl.constexpr):
    """Numbers of codes 0 to 15, in `dtype`."""
    if CODE == "e2m1":  # sign, exponent and fraction moved to where FP16 has them, 2^14 too small
        bits = ((nibbles.to(tl.int16) & 7) << 9) | ((nibbles.to(tl.int16) & 8) << 12)
        return (bits.to(tl.float16, bitcast=True) * 16384.0).to(dtype)
    if CODE == "int4":
        return ((nibbles.to(tl.int16) ^ 8) - 8).to(dtype)
    return (nibbles.to(tl.int16) - 8).to(dtype)


@triton.jit
def load_group_scales(at, mask, EXPONENT: tl.constexpr):
    """f32 scales; exponents mean 2^(e - 127), and 255 is no number."""
    if EXPONENT:
        e = tl.load(at, mask=mask, other=127).to(tl.int32)
        bits = tl.where(e == 0, 1 << 22, e << 23)
        return tl.where(e == 255, float("nan"), bits.to(tl.float32, bitcast=True))
    return tl.load(at, mask=mask, other=1.0).to(tl.float32)


@triton.jit
def spread(scales, EACH: tl.constexpr):
    """[rows, n] -> [rows, n * EACH], each number EACH times."""
    rows: tl.constexpr = scales.shape[0]
    n: tl.constexpr = scales.shape[1]
    return tl.reshape(tl.broadcast_to(scales[:, :, None], [rows, n, EACH]), [rows, n * EACH])


@triton.jit
def read_second(second, expert, row, RUNS: tl.constexpr, RUN: tl.constexpr):
    """The global scale of each row."""
    return tl.load(second + expert * RUNS + tl.minimum(row // RUN, RUNS - 1))
