"""How engines that do not fuse compute `wk`: quantise the activations, then multiply codes with codes.

Only the benchmark uses this, as the side to compare with: the project's own path leaves activations as they are. The
GEMM is torch's block-scaled one (cuBLAS) where it takes these shapes, and else the usual Triton kernel. Next: arms.py.
"""

# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.checkpoint.write import E4M3_MAX
from saccade.kernels.types import SCALE_BLOCK, Matrix

LEAST_ROWS = 16  # of a tile of tensor cores
TILES = ((16, 4, 6), (32, 4, 6), (64, 4, 5), (128, 4, 4))  # rows of weights, warps, stages: the best one is quoted


@triton.jit
def _quantize(x, codes, scales, K, scale_stride, BLOCK: tl.constexpr, MOST: tl.constexpr):
    """One program: one token's 128 columns. scales lie column by column, as cuBLAS wants them."""
    token, block = tl.program_id(0), tl.program_id(1)
    column = block * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + token * K + column, mask=column < K, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(value), 0), 1e-10) / MOST
    tl.store(codes + token * K + column, (value / scale).to(tl.float8e4nv), mask=column < K)
    tl.store(scales + block * scale_stride + token, scale)


def quantize_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [T, k] -> e4m3 codes [n, k] and f32 scales [n, ceil(k / 128)], one for each token's 128 columns; n is T made a
    multiple of 16, and rows from T on are not written."""
    tokens, k = x.shape
    rows, blocks = -(-tokens // LEAST_ROWS) * LEAST_ROWS, triton.cdiv(k, SCALE_BLOCK)
    codes = torch.empty(rows, k, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(blocks, rows, dtype=torch.float32, device=x.device).t()
    _quantize[tokens, blocks](x, codes, scales, k, scales.stride(1), BLOCK=SCALE_BLOCK, MOST=E4M3_MAX)
    return codes, scales


@triton.jit
def _multiply_blocks(
    a, a_scales, w, w_scales, out, tokens, rows, scale_stride, K: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[tokens, BN rows of w]: codes times codes, each block of 128 columns then times its two scales. Weights stand
    on the left: tensor cores take 64 rows there, and tokens are few."""
    row, token = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, BM)
    inside, wanted = row < rows, token < tokens
    sums = tl.zeros([BN, BM], tl.float32)
    column = tl.arange(0, BLOCK)
    blocks: tl.constexpr = (K + BLOCK - 1) // BLOCK
    for block in range(blocks):
        place = block * BLOCK + column
        left = tl.load(w + row[:, None] * K + place[None], mask=inside[:, None], other=0.0)
        right = tl.load(a + token[None] * K + place[:, None])  # there are 16 rows, whatever is in them
        w_scale = tl.load(w_scales + (row // BLOCK) * blocks + block, mask=inside, other=0.0)
        a_scale = tl.load(a_scales + block * scale_stride + token, mask=wanted, other=0.0)
        sums += tl.dot(left, right) * w_scale[:, None] * a_scale[None]
    places = out + token[None] * rows + row[:, None]
    tl.store(places, sums.to(out.dtype.element_ty), mask=wanted[None] & inside[:, None])


def multiply_quantised(codes: Tensor, scales: Tensor, w: Matrix, tokens: int, tile: tuple[int, int, int]) -> Tensor:
    """bf16 [tokens, rows] of quantised activations and FP8 128x128 weights."""
    assert w.scale is not None
    rows, k = w.data.shape
    out = torch.empty(tokens, rows, dtype=torch.bfloat16, device=codes.device)
    height, warps, stages = tile
    _multiply_blocks[(triton.cdiv(rows, height),)](
        codes, scales, w.data, w.scale, out, tokens, rows, scales.stride(1), K=k,
        BM=LEAST_ROWS, BN=height, BLOCK=SCALE_BLOCK, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


def multiply_scaled(codes: Tensor, scales: Tensor, w: Matrix) -> Tensor:
    """The same by torch._scaled_mm, bf16 [n, rows]. It raises where cuBLAS does not take such scales."""
    assert w.scale is not None
    out: Tensor = torch._scaled_mm(codes, w.data.t(), scales, w.scale.t(), out_dtype=torch.bfloat16)
    return out
