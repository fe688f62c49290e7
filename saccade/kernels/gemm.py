"""`linear` and `mlp` on a GPU for many tokens: y = x @ w.T, the weights decoded in registers.

The weights are the left operand (y.T = w @ x.T): it alone may come from registers, where FP8 codes become FP16 exactly.
Activations become 16-bit numbers once, before the product (operands.py). Sums are fp32; the scale of a block of 128 x
128 codes multiplies the sum over its 128 columns. Up to 16 tokens go to skinny.py. What has no kernel here is computed
as reference.py says. Knows no layers. Next: experts.py, the same over experts.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.kernels import reference
from saccade.kernels.launch import IS_INTERPRETED
from saccade.kernels.matrix import Matrix
from saccade.kernels.operands import Operand, write
from saccade.kernels.skinny import MOST, kind, skinny

INTERPRETED: tl.constexpr = tl.constexpr(IS_INTERPRETED)


class Tile(NamedTuple):
    """How a product is cut. A larger tile a warp than 64 x 128 for four of them spills: there are two sets of sums, one
    of the 128 columns that share a scale."""

    rows: int = 128  # of weights
    tokens: int = 128
    columns: int = 128
    warps: int = 8
    stages: int = 3


TILE = Tile(rows=64, warps=4)  # 155 us for 2,048 tokens of qkv_a on an H200, 208 with 128 rows and 8 warps
PRECISE_TILE = Tile(rows=64, tokens=64, warps=4)  # 259 us beside 408 with 128 x 128 x 64 and 8 warps


@triton.jit
def dot(a, b, total):
    """total + a @ b in fp32. The interpreter multiplies no BF16."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total)
    return tl.dot(a, b, total)


@triton.jit(do_not_specialize=["T"])
def multiply(
    high, low, unit, codes, scale, y, T, N, scale_stride, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, PRECISE: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """y [T, N] = (high + low) [T, K] * unit @ (codes * scale) [N, K].T"""
    blocks = tl.cdiv(N, BM)
    block = tl.program_id(0) % blocks  # rows of weights fastest: a tile of tokens is read once, all weights stay in L2
    first = tl.program_id(0) // blocks * BN
    row = block * BM + tl.arange(0, BM)
    token = first + tl.arange(0, BN)
    k = tl.arange(0, BK)
    code_at = codes + tl.minimum(row, N - 1).to(tl.int64)[:, None] * K + k[None, :]
    offset = tl.minimum(token, T - 1).to(tl.int64)[None, :] * K + k[:, None]
    high_at, low_at = high + offset, low + offset
    total = tl.zeros([BM, BN], tl.float32)
    if BM > 128:
        scale_at = scale + (tl.minimum(row, N - 1) // 128 * scale_stride)[:, None]
    else:
        scale_at = scale + block * BM // 128 * scale_stride
    factor = tl.load(scale_at)  # a step ahead
    for start in range(0, K, BK):
        if EVEN:
            weights = tl.load(code_at)
            x = tl.load(high_at)
        else:
            weights = tl.load(code_at, mask=k[None, :] < K - start, other=0.0)
            x = tl.load(high_at, mask=k[:, None] < K - start, other=0.0)
        weights = weights.to(tl.float16)
        part = dot(weights, x, tl.zeros([BM, BN], tl.float32))
        if PRECISE:
            rest = tl.load(low_at) if EVEN else tl.load(low_at, mask=k[:, None] < K - start, other=0.0)
            part = dot(weights, rest, part)
        following = tl.load(scale_at + tl.minimum(start + BK, K - 1) // 128)
        total += part * factor
        factor = following
        code_at += BK
        high_at += BK
        low_at += BK
    total = tl.trans(total) * tl.load(unit + token, mask=token < T, other=0.0)[:, None]
    at = y + token.to(tl.int64)[:, None] * N + row[None, :]
    tl.store(at, total, mask=(token[:, None] < T) & (row[None, :] < N))


def multiply_blocks(x: Operand, w: Matrix, precise: bool = False, tile: Tile | None = None) -> Tensor:
    """f32 [T, n] = x [T, k] @ w [n, k].T for FP8 codes with f32 scales of 128 x 128."""
    assert w.scale is not None
    t = tile or (PRECISE_TILE if precise else TILE)
    (tokens, k), n = x.high.shape, w.data.shape[0]
    y = torch.empty(tokens, n, dtype=torch.float32, device=x.high.device)
    multiply[(triton.cdiv(n, t.rows) * triton.cdiv(tokens, t.tokens),)](
        x.high, x.low, x.unit, w.data, w.scale, y, tokens, n, w.scale.stride(0), K=k, BM=t.rows, BN=t.tokens,
        BK=t.columns, PRECISE=precise, EVEN=k % t.columns == 0, num_warps=t.warps,
        num_stages=t.stages,
    )  # fmt: skip
    return y


def multiply_plain(x: Operand, w: Tensor, precise: bool) -> Tensor:
    """f32 [..., T, n] = x [..., T, k] @ w [..., n, k].T for BF16 weights, by the library."""
    y = _product(x.high, w)
    return y.add_(_product(x.low, w)) if precise else y


def _product(x: Tensor, w: Tensor) -> Tensor:
    if x.device.type != "cuda":
        return x.float() @ w.float().transpose(-1, -2)
    if w.ndim == 2:
        return torch.mm(x, w.t(), out_dtype=torch.float32)
    return torch.bmm(x, w.transpose(1, 2), out_dtype=torch.float32)


def linear(x: Tensor, w: Matrix | Tensor, out_dtype: torch.dtype | None = None, precise: bool = False) -> Tensor:
    """y [T, n] = x [T, k] @ w [n, k].T, summed in fp32, rounded once to `out_dtype` or x's dtype; or a batch of such
    products, w [B, n, k], x [B, T, k].

    precise: activations keep 16 bits or more instead of 8 beside BF16 weights, 11 beside FP8. Plain tensors (the
    indexer's projection, the router, the heads' matrices) are always multiplied so, and up to 16 tokens too.
    """
    y = _multiply(x, w, precise or isinstance(w, Tensor), False)
    return reference.linear(x, w, out_dtype) if y is None else y.to(out_dtype or x.dtype)


def mlp(x: Tensor, gate_up: Matrix, down: Matrix) -> Tensor:
    """[T, hidden] = down(silu(gate(x)) * up(x))"""
    both = linear(x, gate_up, torch.float32, precise=True)
    y = _multiply(both, down, True, True)
    return reference.linear(reference.silu_and_mul(both), down, x.dtype) if y is None else y.to(x.dtype)


def _multiply(x: Tensor, w: Matrix | Tensor, precise: bool, gated: bool) -> Tensor | None:
    """f32, or None for what has no kernel. gated: silu of the first half of x times the second is multiplied."""
    data = w.data if isinstance(w, Matrix) else w
    if x.shape[-2] == 0:
        return None
    if data.ndim == 3:
        return None if isinstance(w, Matrix) or w.dtype != torch.bfloat16 else _multiply_heads(x, w)
    spelled = kind(w)
    if spelled is None:
        return None
    if x.shape[0] <= MOST:
        return skinny(x, [w], gated=gated)
    if spelled == "brain":
        return multiply_plain(write(x, brain=1 + precise, gated=gated).brain, data, precise)
    assert isinstance(w, Matrix)
    return multiply_blocks(write(x, half=1 + precise, gated=gated).half, w, precise)


def _multiply_heads(x: Tensor, w: Tensor) -> Tensor:
    """f32 [heads, T, n] = x [heads, T, k] @ w [heads, n, k].T; x is a view of [T, heads, ...], w may be transposed."""
    heads, tokens, _ = x.shape
    rows = write(x.transpose(0, 1).flatten(0, 1), brain=2).brain
    high, low = (part.unflatten(0, (tokens, heads)).transpose(0, 1) for part in (rows.high, rows.low))
    return multiply_plain(Operand(high, low, rows.unit), w, True)
