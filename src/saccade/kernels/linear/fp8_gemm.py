"""Products of many tokens, y = x @ w.T, both sides in FP8: x with a scale for 128 columns of a row, w for 128 x 128.

Tensor cores multiply codes twice as fast as 16-bit numbers, but sum them in some 14 bits. So a sum runs over the 128
columns of one scale only; scales multiply it, and fp32 adds it up. The tokens are the left operand, not the weights as
in gemm.py: a thread holds sums of two tokens then, and loads their two scales a step instead of 32.

torch has the same product, without a residual. Where it serves, it is called instead: 4,096 tokens times qkv_a take
124 us, and 174 here.

Reference: `linear` in reference.py with activations "fp8". Serves more than 64 tokens, and any number in tests; weights
in FP8 by 128 x 128. Next: gemm.py, the same with more bits.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as functional
import triton
import triton.language as tl
from torch import Tensor

from saccade.kernels.activations import Codes, dot
from saccade.kernels.launch import tiled
from saccade.kernels.types import SCALE_BLOCK, Matrix


class CodesConfig(NamedTuple):
    """How a product is divided. A step is the 128 columns of a scale."""

    rows: int = 128  # of weights
    tokens: int = 128
    warps: int = 8
    stages: int = 4


CODES = CodesConfig()
LIBRARY_COLUMNS = 4 * SCALE_BLOCK


@triton.jit(do_not_specialize=["T"])
def _multiply_codes(
    x, x_scale, codes, scale, residual, y, T, N, scale_stride, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """y [T, N] = (x * x_scale) [T, K] @ (codes * scale) [N, K].T + residual [T, N]."""
    blocks = tl.cdiv(N, BN)
    block = tl.program_id(0) % blocks  # rows of weights fastest: a tile of tokens is read once, all weights stay in L2
    first = tl.program_id(0) // blocks * BM
    row, token = block * BN + tl.arange(0, BN), first + tl.arange(0, BM)
    STEPS: tl.constexpr = (K + BK - 1) // BK
    factors = x_scale + tl.minimum(token, T - 1).to(tl.int64) * STEPS
    scale_at = scale + block * BN // 128 * scale_stride
    total = tl.zeros([BM, BN], tl.float32)
    factor = tl.load(factors) * tl.load(scale_at)  # a step ahead
    for step in range(STEPS):
        part = dot(x.load([first, step * BK]), codes.load([block * BN, step * BK]).T, tl.zeros([BM, BN], tl.float32))
        ahead = tl.minimum(step + 1, STEPS - 1)
        following = tl.load(factors + ahead) * tl.load(scale_at + ahead)
        total += part * factor[:, None]
        factor = following
    at, inside = token.to(tl.int64)[:, None] * N + row[None, :], (token[:, None] < T) & (row[None, :] < N)
    if RESIDUAL:
        total += tl.load(residual + at, mask=inside, other=0.0)
    tl.store(y + at, total, mask=inside)


def is_in_library(x: Codes, w: Matrix) -> bool:
    """Whether torch has this product: on Hopper, and scales of rows of w in fours."""
    if x.numbers.device.type != "cuda" or torch.cuda.get_device_capability(x.numbers.device) != (9, 0):
        return False
    return x.numbers.shape[1] % LIBRARY_COLUMNS == 0 and len(x.numbers) % 4 == 0 and w.data.shape[0] % 16 == 0


def multiply_by_library(x: Codes, w: Matrix) -> Tensor:
    """f32 [T, n] = x [T, k] @ w [n, k].T. Of 20 products on an H200 19 had the bits of the kernel below, and not
    that of 128 tokens by 512 rows of 7,168."""
    assert w.scale is not None
    kinds = functional.ScalingType.BlockWise1x128, functional.ScalingType.BlockWise128x128
    scales = x.scales.t().contiguous().t()  # it takes those of 128 columns side by side
    y: Tensor = functional.scaled_mm(
        x.numbers, w.data.t(), scales, kinds[0], w.scale.t(), kinds[1], output_dtype=torch.float32
    )
    return y


def multiply_codes(x: Codes, w: Matrix, residual: Tensor | None = None, config: CodesConfig | None = None) -> Tensor:
    """f32 [T, n] = x [T, k] @ w [n, k].T + residual, for FP8 codes with f32 scales of 128 x 128."""
    if residual is None and config is None and is_in_library(x, w):
        return multiply_by_library(x, w)
    assert w.scale is not None and (residual is None or residual.is_contiguous())
    how, (tokens, k), n = config or CODES, x.numbers.shape, w.data.shape[0]
    assert 128 % how.rows == 0, f"{how}: a block of weights has one scale"
    y = torch.empty(tokens, n, dtype=torch.float32, device=x.numbers.device)
    taken, codes = tiled(x.numbers, how.tokens, SCALE_BLOCK), tiled(w.data, how.rows, SCALE_BLOCK)
    _multiply_codes[(triton.cdiv(n, how.rows) * triton.cdiv(tokens, how.tokens),)](
        taken, x.scales, codes, w.scale, y if residual is None else residual, y, tokens, n, w.scale.stride(0), K=k,
        BM=how.tokens, BN=how.rows, BK=SCALE_BLOCK, RESIDUAL=residual is not None, num_warps=how.warps,
        num_stages=how.stages,
    )  # fmt: skip
    return y
