"""The experts' MLP for 1 to 16 tokens where two numbers share a byte: as fast as the codes can be read.

A program reads a few rows of one expert for one token; numbers are decoded in registers and multiplied in fp32, without
rounding activations. Two launches: gate, up and silu(gate) * up for each pair of token and expert; then down, where a
program adds a token's experts in the order in which they were chosen. Next: spelling.py says what the codes are.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.kernels import reference
from saccade.kernels.launch import begin, uses_pdl, wait
from saccade.kernels.matrix import Matrix
from saccade.kernels.spelling import END, read_nibbles, read_scales, read_second, spell

# Rows of a program (of gate, and as many of up; of down), bytes of a row at a time; warps.
GATE_ROWS, DOWN_ROWS, BYTES, WARPS = 4, 32, 512, 4


@triton.jit
def sum_rows(
    x, codes, scale, second, expert, row, scale_stride, scale_rows, N, R: tl.constexpr, BYTES: tl.constexpr,
    K: tl.constexpr, CODE: tl.constexpr, WHERE: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    EXPONENT: tl.constexpr, RUN: tl.constexpr, RUNS: tl.constexpr, DIVIDES: tl.constexpr,
):  # fmt: skip
    """[R]: rows of an expert's weights times x [K]."""
    STORED: tl.constexpr = K // 2
    # Sums of as many bytes as share a scale and a thread: a scale is multiplied once for each.
    EACH: tl.constexpr = WIDTH // 2 if WIDTH < 32 else 16
    code_at = codes + (expert.to(tl.int64) * N + row)[:, None] * STORED
    scale_at = scale + ((expert.to(tl.int64) * scale_rows + row // ROWS) * scale_stride)[:, None]
    total = tl.zeros([R, BYTES // EACH], tl.float32)
    for start in tl.static_range(0, STORED, BYTES):
        k = start + tl.arange(0, BYTES)
        inside = k < STORED
        found = tl.load(code_at + k[None, :], mask=inside[None, :] & (row[:, None] >= 0), other=0)
        low = tl.load(x + 2 * k, mask=inside, other=0.0).to(tl.float32)
        high = tl.load(x + 2 * k + 1, mask=inside, other=0.0).to(tl.float32)
        product = read_nibbles(found & 15, CODE, tl.float32) * low[None, :]
        product += read_nibbles(found >> 4, CODE, tl.float32) * high[None, :]
        product = tl.sum(tl.reshape(product, [R, BYTES // EACH, EACH]), 2)
        if WHERE != END:
            group = start + tl.arange(0, BYTES // EACH) * EACH
            at = scale_at + (group // (WIDTH // 2))[None, :]
            product *= read_scales(at, (group < STORED)[None, :] & (row[:, None] >= 0), EXPONENT)
        total += product
    result = tl.sum(total, 1)
    if WHERE == END:
        result *= tl.load(scale + (expert.to(tl.int64) * scale_rows + row // ROWS) * scale_stride).to(tl.float32)
    if RUN > 0:
        factor = read_second(second, expert, row, RUNS, RUN)
        result = result / factor if DIVIDES else result * factor
    return result


@triton.jit
def gate_packed(
    x, experts, codes, scale, second, y, N, scale_stride, scale_rows, x_stride, TOPK: tl.constexpr, R: tl.constexpr,
    BYTES: tl.constexpr, K: tl.constexpr, CODE: tl.constexpr, WHERE: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr, EXPONENT: tl.constexpr, RUN: tl.constexpr, RUNS: tl.constexpr, DIVIDES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """y [pairs, N / 2] = silu(gate) * up"""
    begin(PDL)
    width = N // 2
    pair = tl.program_id(0)
    wait(PDL)
    expert = tl.load(experts + pair)
    column = tl.program_id(1) * R + tl.arange(0, R)
    row = tl.minimum(column, width - 1)
    x += pair // TOPK * x_stride
    gate = sum_rows(x, codes, scale, second, expert, row, scale_stride, scale_rows, N, R, BYTES, K, CODE, WHERE, ROWS,
                    WIDTH, EXPONENT, RUN, RUNS, DIVIDES)  # fmt: skip
    up = sum_rows(x, codes, scale, second, expert, row + width, scale_stride, scale_rows, N, R, BYTES, K, CODE, WHERE,
                  ROWS, WIDTH, EXPONENT, RUN, RUNS, DIVIDES)  # fmt: skip
    tl.store(y + pair * width + column, gate / (1 + tl.exp(-gate)) * up, mask=column < width)


@triton.jit
def down_packed(
    x, experts, weights, codes, scale, second, y, N, scale_stride, scale_rows, TOPK: tl.constexpr, R: tl.constexpr,
    BYTES: tl.constexpr, K: tl.constexpr, CODE: tl.constexpr, WHERE: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr, EXPONENT: tl.constexpr, RUN: tl.constexpr, RUNS: tl.constexpr, DIVIDES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """y [T, N] = the sum over a token's pairs of weight * down(x), x [pairs, K]."""
    begin(PDL)
    token = tl.program_id(0)
    column = tl.program_id(1) * R + tl.arange(0, R)
    row = tl.minimum(column, N - 1)
    wait(PDL)
    total = tl.zeros([R], tl.float32)
    for i in tl.static_range(TOPK):
        pair = token * TOPK + i
        expert = tl.load(experts + pair)
        product = sum_rows(x + pair * K, codes, scale, second, expert, row, scale_stride, scale_rows, N, R, BYTES, K,
                           CODE, WHERE, ROWS, WIDTH, EXPONENT, RUN, RUNS, DIVIDES)  # fmt: skip
        total += product * tl.load(weights + pair)
    tl.store(y + token * N + column, total, mask=column < N)


def packed_experts(
    x: Tensor, experts: Tensor, weights: Tensor, gate_up: Matrix, down: Matrix,
    rows: tuple[int, int] = (GATE_ROWS, DOWN_ROWS), warps: int = WARPS,
) -> Tensor:  # fmt: skip
    """[T, hidden]: the sum over a token's experts of weight * mlp(x), in the order of `experts` [T, topk], for few
    tokens and codes of 4 bits; anything else as reference.py says."""
    first, last = spell(gate_up), spell(down)
    if first is None or last is None or not (first.is_packed and last.is_packed) or x.stride(1) != 1:
        return reference.expert_mlp(x, experts, weights, gate_up, down)
    tokens, topk = experts.shape
    pdl = uses_pdl(x)
    experts, weights = experts.contiguous(), weights.contiguous()
    n = gate_up.data.shape[1] // 2
    hidden = torch.empty(tokens * topk, n, dtype=torch.float32, device=x.device)
    gate_packed[(tokens * topk, triton.cdiv(n, rows[0]))](
        x, experts, first.codes, first.scale, first.second, hidden, 2 * n, first.scale.stride(1), first.scale.shape[1],
        x.stride(0), TOPK=topk, R=rows[0], BYTES=_bytes(first.columns), K=first.columns, **first.form,
        RUNS=max(1, first.second.shape[-1]), PDL=pdl, num_warps=warps, launch_pdl=pdl,
    )  # fmt: skip
    y = torch.empty(tokens, down.data.shape[1], dtype=torch.float32, device=x.device)
    down_packed[(tokens, triton.cdiv(y.shape[1], rows[1]))](
        hidden, experts, weights, last.codes, last.scale, last.second, y, y.shape[1], last.scale.stride(1),
        last.scale.shape[1], TOPK=topk, R=rows[1], BYTES=_bytes(last.columns), K=last.columns, **last.form,
        RUNS=max(1, last.second.shape[-1]), PDL=pdl, num_warps=warps, launch_pdl=pdl,
    )  # fmt: skip
    return y.to(x.dtype)


def _bytes(columns: int) -> int:
    return min(BYTES, triton.next_power_of_2(columns // 2))
