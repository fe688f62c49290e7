"""What a recurrent layer's gates are, from their low ranks: logarithms of decays, beta, and the output gate before its
sigmoid. Both matrices [heads * dim, dim] share a launch.

The launch also clears what the recurrence counts in, and rows of its result that belong to no request. It waits before
it lets the next kernel start: so tokens.py may read states, which an earlier kernel wrote, before it waits itself.
Reference: `find_decay` in delta.py, `linear` in kernels/reference.py. Serves any number of tokens and matrices in BF16
or F32; activations keep 16 bits beside BF16. Next: tokens.py.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.kernels.activations import dot, split_in_two
from saccade.kernels.launch import begin, uses_pdl, wait
from saccade.kernels.recurrent.delta import DeltaWeights
from saccade.kernels.types import Matrix


class GatesConfig(NamedTuple):
    """How the work is divided. Not measured yet."""

    rows: int = 64  # of a matrix: 256 programs of 16 KB for 64 heads
    tokens: int = 64  # of a program at most
    warps: int = 4


class Gates(NamedTuple):
    """Of each token. `out` is where the recurrence goes: zeros in rows behind the last request."""

    decays: Tensor  # f32 [T, heads * dim], logarithms
    betas: Tensor  # f32 [T, heads]
    outputs: Tensor  # f32 [T, heads * dim]: of the result, before the sigmoid
    out: Tensor  # f32 [T, heads * dim]
    counters: Tensor  # i32, zeros


@triton.jit(do_not_specialize=["T", "R", "counted"])
def _find_gates(
    forget, gate, beta, f_b, g_b, bias, rates, query_start, decays, betas, outputs, out, counters, T, R, counted,
    stride, bound, N: tl.constexpr, DIM: tl.constexpr, HEADS: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr,
    BK: tl.constexpr, BH: tl.constexpr, COUNTERS: tl.constexpr, F32: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    block, is_output = tl.program_id(0) // 2, tl.program_id(0) % 2
    row, k = block * BN + tl.arange(0, BN), tl.arange(0, BK)
    token = tl.program_id(1) * BT + tl.arange(0, BT)
    w = f_b
    low = forget
    if is_output:
        w = g_b
        low = gate
    weights = tl.load(w + row[:, None] * DIM + k[None, :], mask=(row < N)[:, None] & (k < DIM)[None, :], other=0.0)
    wait(PDL)
    begin(PDL)  # not earlier: the next kernel reads states before it waits
    there = token < T
    line = token.to(tl.int64)
    x = tl.load(low + line[None, :] * stride + k[:, None], mask=(k < DIM)[:, None] & there[None, :], other=0.0)
    total = tl.zeros([BN, BT], tl.float32)
    if F32:
        total = tl.dot(weights, x, total, input_precision="ieee")
    else:
        high, rest = split_in_two(x, tl.bfloat16)
        total = dot(weights, high, dot(weights, rest, total))
    total = tl.trans(total)  # [BT, BN]
    place = line[:, None] * N + row[None, :]
    mask = there[:, None] & (row < N)[None, :]
    if is_output:
        tl.store(outputs + place, total, mask=mask)
        end = tl.load(query_start + R)
        tl.store(out + place, tl.zeros([BT, BN], tl.float32), mask=mask & (token >= end)[:, None])
    else:
        rate = tl.exp(tl.load(rates + row // DIM, mask=row < N, other=0.0))
        total = rate[None, :] * (total + tl.load(bias + row, mask=row < N, other=0.0)[None, :])
        tl.store(decays + place, bound * tl.sigmoid(total), mask=mask)
        if block == 0:
            head = tl.arange(0, BH)
            here = there[:, None] & (head < HEADS)[None, :]
            share = tl.load(beta + line[:, None] * stride + head[None, :], mask=here, other=0.0)
            tl.store(betas + line[:, None] * HEADS + head[None, :], tl.sigmoid(share), mask=here)
            if COUNTERS > 0 and tl.program_id(1) == 0:
                counter = tl.arange(0, COUNTERS)
                tl.store(counters + counter, tl.zeros([COUNTERS], tl.int32), mask=counter < counted)


def has_gates(f_b: Matrix, g_b: Matrix) -> bool:
    """Whether the kernel reads both: plain numbers of one kind."""
    kinds = {w.data.dtype for w in (f_b, g_b)}
    plain = all(w.scale is None and w.data.is_contiguous() for w in (f_b, g_b))
    return plain and len(kinds) == 1 and kinds <= {torch.bfloat16, torch.float32}


def find_gates(
    forget: Tensor, gate: Tensor, beta: Tensor, f_b: Matrix, g_b: Matrix, delta: DeltaWeights, query_start: Tensor,
    counters: int, config: GatesConfig | None = None,
) -> Gates:  # fmt: skip
    """forget, gate: f32 [T, dim], low ranks; beta: f32 [T, heads], before its sigmoid. All are views of rows of one
    length."""
    how, tokens, heads, dim = config or GatesConfig(), len(forget), delta.heads, delta.dim
    n, stride = heads * dim, forget.stride(0)
    assert gate.stride(0) == beta.stride(0) == stride, "low ranks lie in the rows of one product"
    decays, outputs, out = (forget.new_empty(tokens, n) for _ in range(3))
    betas = forget.new_empty(tokens, heads)
    counted = torch.empty(max(1, counters), dtype=torch.int32, device=forget.device)
    width = min(how.tokens, max(16, triton.next_power_of_2(tokens)))
    pdl = uses_pdl(forget)
    _find_gates[2 * triton.cdiv(n, how.rows), triton.cdiv(tokens, width)](
        forget, gate, beta, f_b.data, g_b.data, delta.bias, delta.decay, query_start, decays, betas, outputs, out,
        counted, tokens, len(query_start) - 1, counters, stride, delta.lower_bound, N=n, DIM=dim, HEADS=heads,
        BN=how.rows, BT=width, BK=max(16, triton.next_power_of_2(dim)), BH=triton.next_power_of_2(heads),
        COUNTERS=triton.next_power_of_2(counters) if counters else 0, F32=f_b.data.dtype == torch.float32, PDL=pdl,
        num_warps=how.warps, launch_pdl=pdl,
    )  # fmt: skip
    return Gates(decays, betas, outputs, out, counted)
