"""`linear` and `mlp` on a GPU for many tokens: y = x @ w.T, the weights decoded in registers.

The weights are the left operand (y.T = w @ x.T): it alone may come from registers, where FP8 codes become FP16 exactly.
Activations become two 16-bit numbers each, once, before the product (operands.py). Sums are fp32; the scale of a block
of 128 x 128 codes multiplies sums over 64 of its columns. Up to 16 tokens go to skinny.py. What has no kernel here is
computed as reference.py says. Knows no layers. Next: experts.py, the same over experts.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.kernels import reference
from saccade.kernels.linear.head_gemm import multiply_heads
from saccade.kernels.launch import tiled
from saccade.kernels.types import Matrix
from saccade.kernels.activations import Forms, Operand, Written, dot_woven, prepare
from saccade.kernels.linear.split_k import MOST, kind, skinny


class Tile(NamedTuple):
    """How a product is cut. More than 32 x 64 sums a warp spill: there are two sets of them, one of the columns of a
    step."""

    rows: int = 128  # of weights
    tokens: int = 64
    columns: int = 64
    warps: int = 4
    stages: int = 3


TILE = Tile()
# Of a thread: three programs of 4 warps share a multiprocessor. With a residual there were 183: o_proj of 4,096
# tokens took 424 us, not 390.
REGISTERS = 168


@triton.jit(do_not_specialize=["T"])
def _multiply_blocks(
    x, unit, codes, scale, residual, y, T, N, scale_stride, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """y [T, N] = x [T, K] * unit @ (codes * scale) [N, K].T + residual [T, N]; x: T rows of high, then T of low."""
    blocks = tl.cdiv(N, BM)
    block = tl.program_id(0) % blocks  # rows of weights fastest: a tile of tokens is read once, all weights stay in L2
    first = tl.program_id(0) // blocks * BN
    row = block * BM + tl.arange(0, BM)
    token = first + tl.arange(0, BN)
    total = tl.zeros([BM, BN], tl.float32)  # where the tokens end, x goes on with others' low numbers: not stored
    scale_at = scale + block * BM // 128 * scale_stride
    factor = tl.load(scale_at)  # a step ahead
    for start in range(0, K, BK):
        weights = codes.load([block * BM, start]).to(tl.float16)
        part = dot_woven(weights, x.load([first, start]).T, tl.zeros([BM, BN], tl.float32))
        part = dot_woven(weights, x.load([T + first, start]).T, part)
        following = tl.load(scale_at + tl.minimum(start + BK, K - 1) // 128)
        total += part * factor
        factor = following
    total = tl.trans(total) * tl.load(unit + token, mask=token < T, other=0.0)[:, None]
    at, inside = token.to(tl.int64)[:, None] * N + row[None, :], (token[:, None] < T) & (row[None, :] < N)
    if RESIDUAL:
        total += tl.load(residual + at, mask=inside, other=0.0)
    tl.store(y + at, total, mask=inside)


def multiply_blocks(x: Operand, w: Matrix, residual: Tensor | None = None, tile: Tile | None = None) -> Tensor:
    """f32 [T, n] = x [T, k] @ w [n, k].T + residual, for FP8 codes with f32 scales of 128 x 128; x woven."""
    assert w.scale is not None
    assert len(x.unit) == x.numbers.shape[1], "expected an operand without room for more rows"
    assert residual is None or residual.is_contiguous()
    t = tile or TILE
    assert 128 % t.rows == 0 and 128 % t.columns == 0, f"{t}: a block of weights has one scale"
    (_, tokens, k), n = x.numbers.shape, w.data.shape[0]
    y = torch.empty(tokens, n, dtype=torch.float32, device=x.numbers.device)
    taken, codes = tiled(x.numbers.view(-1, k), t.tokens, t.columns), tiled(w.data, t.rows, t.columns)
    _multiply_blocks[(triton.cdiv(n, t.rows) * triton.cdiv(tokens, t.tokens),)](
        taken, x.unit, codes, w.scale, y if residual is None else residual, y, tokens, n, w.scale.stride(0), K=k,
        BM=t.rows, BN=t.tokens, BK=t.columns, RESIDUAL=residual is not None, num_warps=t.warps, num_stages=t.stages,
        maxnreg=REGISTERS,
    )  # fmt: skip
    return y


def multiply_plain(x: Operand, w: Tensor, precise: bool) -> Tensor:
    """f32 [T, n] = x [T, k] @ w [n, k].T for BF16 weights, by the library."""
    y = _product(x.high, w)
    return y.add_(_product(x.low, w)) if precise else y


def _product(x: Tensor, w: Tensor) -> Tensor:
    if x.device.type != "cuda":
        return x.float() @ w.float().t()
    return torch.mm(x, w.t(), out_dtype=torch.float32)


def find_forms(w: Matrix | Tensor, precise: bool = False) -> Forms:
    """In which forms `multiply` takes what meets w."""
    spelled = kind(w)
    if spelled is None:
        return Forms(plain=True)
    return Forms(half=True) if spelled == "half" else Forms(brain=1 + is_precise(w, precise))


def is_precise(w: Matrix | Tensor, precise: bool) -> bool:
    """Plain tensors are always multiplied so: the indexer's projection, the router, the heads' matrices."""
    return precise or isinstance(w, Tensor)


def multiply(x: Written, w: Matrix | Tensor, precise: bool = False, residual: Tensor | None = None) -> Tensor:
    """f32 [T, n] = x [T, k] @ w [n, k].T, plus `residual` (contiguous), for many tokens; x in the forms that w
    asks for."""
    spelled = kind(w)
    if spelled == "half":
        assert isinstance(w, Matrix)
        return multiply_blocks(x.half, w, residual)
    if spelled == "brain":
        y = multiply_plain(x.brain, w.data if isinstance(w, Matrix) else w, is_precise(w, precise))
    else:
        y = reference.linear(x.plain, w, torch.float32)
    return y if residual is None else y.add_(residual)


def linear(x: Tensor, w: Matrix | Tensor, out_dtype: torch.dtype | None = None, precise: bool = False) -> Tensor:
    """y [T, n] = x [T, k] @ w [n, k].T, summed in fp32, rounded once to `out_dtype` or x's dtype; or a batch of such
    products, w [B, n, k], x [B, T, k].

    Activations keep 22 bits beside FP8 codes in blocks. precise: 16 instead of 8 beside BF16 weights; plain tensors are
    always multiplied so, and up to 16 tokens too.
    """
    y = _multiply(x, w, precise, False)
    return reference.linear(x, w, out_dtype) if y is None else y.to(out_dtype or x.dtype)


def mlp(x: Tensor, gate_up: Matrix, down: Matrix) -> Tensor:
    """[T, hidden] = down(silu(gate(x)) * up(x))"""
    both = linear(x, gate_up, torch.float32, precise=True)
    y = _multiply(both, down, True, True)
    return reference.linear(reference.silu_and_mul(both), down, x.dtype) if y is None else y.to(x.dtype)


def _multiply(x: Tensor, w: Matrix | Tensor, precise: bool, gated: bool) -> Tensor | None:
    """f32, or None for what has no kernel. gated: silu of the first half of x times the second is multiplied."""
    if x.numel() == 0 or (w.data if isinstance(w, Matrix) else w).numel() == 0:
        return None
    if x.ndim == 3:
        if isinstance(w, Matrix) or w.dtype != torch.bfloat16:
            return None
        return multiply_heads(x.transpose(0, 1), w.transpose(1, 2)).transpose(0, 1)
    if kind(w) is None:
        return None
    if x.shape[0] <= MOST:
        return skinny(x, [w], gated=gated)
    return multiply(prepare(x, find_forms(w, precise), gated=gated), w, precise)
