"""The experts' MLP of few tokens in 4-bit codes, as fast as the codes can be read. Eight numbers share a word.

A program is one warp. It reads a few rows of one expert for one token, all of them at once. Numbers are decoded in
registers, two by two, and multiplied in fp32; activations are not rounded. Activations come with columns eight apart
side by side, so that a thread multiplies what it has read. The first launch computes gate, up and silu(gate) * up for
each pair of token and expert. The second computes down and adds a token's experts in the order of the choice.

Reference: `expert_mlp` in reference.py, which also computes what no kernel here reads. Serves up to DECODE_TOKENS
tokens; codes of 4 bits in all encodings. Next: formats.py.
"""

from math import inf

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.kernels import reference
from saccade.kernels.activations import clamp_gate, write_activations
from saccade.kernels.formats import END, load_group_scales, read_format, read_second
from saccade.kernels.launch import begin, uses_pdl, wait
from saccade.kernels.types import Matrix

# Rows of a program: of gate, and as many of up; of down.
GATE_ROWS, DOWN_ROWS = 2, 4
WORDS = 128  # that a warp reads at once: 16 bytes a thread


@triton.jit
def to_float(bits):
    """The two FP16 numbers in each word, as f32."""
    low = bits.to(tl.int16).to(tl.float16, bitcast=True)
    high = (bits >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    return low.to(tl.float32), high.to(tl.float32)


@triton.jit
def read_pair(words, PLACE: tl.constexpr, CODE: tl.constexpr):
    """Numbers PLACE and PLACE + 4 of the eight in each word; of e2m1, 2^-14 of them."""
    shifted = words >> (4 * PLACE)
    if CODE == "e2m1":  # sign, exponent and fraction moved to where FP16 has them
        return to_float(((shifted << 9) & 0x0E000E00) | ((shifted << 12) & -0x7FFF8000))
    # 0x6400 is 1024 in FP16, and its last bit counts 1.
    low, high = to_float((shifted & 0x000F000F) ^ (0x64086408 if CODE == "int4" else 0x64006400))
    return low - 1032.0, high - 1032.0


@triton.jit
def sum_rows(
    x, codes, scale, second, expert, row, scale_stride, scale_rows, N, R: tl.constexpr, W: tl.constexpr,
    K: tl.constexpr, CODE: tl.constexpr, WHERE: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    EXPONENT: tl.constexpr, RUN: tl.constexpr, RUNS: tl.constexpr, DIVIDES: tl.constexpr,
):  # fmt: skip
    """[R]: rows of an expert's weights times x [8, K / 8]."""
    STORED: tl.constexpr = K // 8
    EVEN: tl.constexpr = STORED % W == 0
    EACH: tl.constexpr = 2 if WIDTH == 16 else 4  # words that share a scale and a thread
    code_at = codes + (expert.to(tl.int64) * N + row)[:, None] * STORED
    scale_at = scale + ((expert.to(tl.int64) * scale_rows + row // ROWS) * scale_stride)[:, None]
    total = tl.zeros([R, W // EACH], tl.float32)
    for start in tl.static_range(0, STORED, W):
        k = start + tl.arange(0, W)[None, :] + 0 * row[:, None]
        words = tl.load(code_at + k) if EVEN else tl.load(code_at + k, mask=k < STORED, other=0)
        product = tl.zeros([R, W], tl.float32)
        for place in tl.static_range(4):
            at = x + place * STORED + k
            low, high = read_pair(words, place, CODE)
            if EVEN:
                product += low * tl.load(at)
                product += high * tl.load(at + 4 * STORED)
            else:
                product += low * tl.load(at, mask=k < STORED, other=0.0)
                product += high * tl.load(at + 4 * STORED, mask=k < STORED, other=0.0)
        part = tl.sum(tl.reshape(product, [R, W // EACH, EACH]), 2)
        if WHERE != END:
            word = start + tl.arange(0, W // EACH)[None, :] * EACH + 0 * row[:, None]
            part *= load_group_scales(scale_at + word // (WIDTH // 8), word < STORED, EXPONENT)
        total += part
    result = tl.sum(total, 1)
    if CODE == "e2m1":
        result *= 16384.0
    if WHERE == END:
        at = scale + (expert.to(tl.int64) * scale_rows + row // ROWS) * scale_stride
        result *= load_group_scales(at, row >= 0, EXPONENT)
    if RUN > 0:
        factor = read_second(second, expert, row, RUNS, RUN)
        result = result / factor if DIVIDES else result * factor
    return result


@triton.jit
def gate_packed(
    x, experts, codes, scale, second, y, N, scale_stride, scale_rows, TOPK: tl.constexpr, PROGRAM: tl.constexpr,
    R: tl.constexpr, W: tl.constexpr, K: tl.constexpr, CODE: tl.constexpr, WHERE: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr, EXPONENT: tl.constexpr, RUN: tl.constexpr, RUNS: tl.constexpr, DIVIDES: tl.constexpr,
    OTHERS: tl.constexpr, LIMIT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y [pairs, 8, N / 2 / 8] = silu(gate) * up of x [T, 8, K / 8]."""
    begin(PDL)
    wait(PDL)
    width = N // 2
    pair = tl.program_id(0)
    expert = tl.load(experts + pair)
    x += pair // TOPK * K
    is_own = True
    if OTHERS:
        is_own = expert >= 0
    if is_own:
        for i in tl.static_range(0, PROGRAM, R):
            column = tl.program_id(1) * PROGRAM + i + tl.arange(0, R)
            row = tl.minimum(column, width - 1)
            gate = sum_rows(x, codes, scale, second, expert, row, scale_stride, scale_rows, N, R, W, K, CODE, WHERE,
                            ROWS, WIDTH, EXPONENT, RUN, RUNS, DIVIDES)  # fmt: skip
            up = sum_rows(x, codes, scale, second, expert, row + width, scale_stride, scale_rows, N, R, W, K, CODE,
                          WHERE, ROWS, WIDTH, EXPONENT, RUN, RUNS, DIVIDES)  # fmt: skip
            place = column // 8 + column % 8 * (width // 8)
            gate, up = clamp_gate(gate, up, LIMIT)
            tl.store(y + pair * width + place, gate / (1 + tl.exp(-gate)) * up, mask=column < width)


@triton.jit
def down_packed(
    x, experts, weights, codes, scale, second, y, N, scale_stride, scale_rows, TOPK: tl.constexpr,
    PROGRAM: tl.constexpr, R: tl.constexpr, W: tl.constexpr, K: tl.constexpr, CODE: tl.constexpr, WHERE: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, EXPONENT: tl.constexpr, RUN: tl.constexpr, RUNS: tl.constexpr,
    DIVIDES: tl.constexpr, OTHERS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y [T, N] = the sum over a token's pairs of weight * down(x), x [pairs, 8, K / 8]."""
    begin(PDL)
    wait(PDL)
    token = tl.program_id(0)
    for i in tl.static_range(0, PROGRAM, R):
        column = tl.program_id(1) * PROGRAM + i + tl.arange(0, R)
        row = tl.minimum(column, N - 1)
        total = tl.zeros([R], tl.float32)
        for j in tl.static_range(TOPK):
            pair = token * TOPK + j
            expert = tl.load(experts + pair)
            is_own = True
            if OTHERS:
                is_own = expert >= 0
            if is_own:
                product = sum_rows(x + pair * K, codes, scale, second, expert, row, scale_stride, scale_rows, N, R, W,
                                   K, CODE, WHERE, ROWS, WIDTH, EXPONENT, RUN, RUNS, DIVIDES)  # fmt: skip
                total += product * tl.load(weights + pair)
        tl.store(y + token * N + column, total, mask=column < N)


def packed_experts(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    gate_up: Matrix,
    down: Matrix,
    rows: tuple[int, int] = (GATE_ROWS, DOWN_ROWS),
    others: bool = False,
    limit: float = inf,
) -> Tensor:
    """[T, hidden]: the sum over a token's experts of weight * mlp(x), in the order of `experts` [T, topk], for few
    tokens and codes of 4 bits; anything else as reference.py says. others: whether some of the ids are -1, experts of
    other ranks, which add nothing. limit: of `silu_and_mul`."""
    first, last = read_format(gate_up), read_format(down)
    if first is None or last is None or not (first.is_packed and last.is_packed) or last.columns % 8:
        return reference.expert_mlp(x, experts, weights, gate_up, down, limit)
    tokens, topk = experts.shape
    pdl = uses_pdl(x)
    experts, weights = experts.contiguous(), weights.contiguous()
    n, apart = gate_up.data.shape[1] // 2, write_activations(x, fp32=True, apart=8).fp32
    hidden = torch.empty(tokens * topk, n, dtype=torch.float32, device=x.device)
    wide = min(WORDS, triton.next_power_of_2(first.columns // 8))
    program = max(rows[0], WORDS // wide)
    gate_packed[(tokens * topk, triton.cdiv(n, program))](
        apart, experts, first.codes.view(torch.int32), first.scale, first.second, hidden, 2 * n,
        first.scale.stride(1), first.scale.shape[1], TOPK=topk, PROGRAM=program, R=WORDS // wide, W=wide,
        K=first.columns, **first.form, RUNS=max(1, first.second.shape[-1]), OTHERS=others, LIMIT=limit, PDL=pdl,
        num_warps=1, launch_pdl=pdl,
    )  # fmt: skip
    y = torch.empty(tokens, down.data.shape[1], dtype=torch.float32, device=x.device)
    wide = min(WORDS, triton.next_power_of_2(last.columns // 8))
    program = max(rows[1], WORDS // wide)
    down_packed[(tokens, triton.cdiv(y.shape[1], program))](
        hidden, experts, weights, last.codes.view(torch.int32), last.scale, last.second, y, y.shape[1],
        last.scale.stride(1), last.scale.shape[1], TOPK=topk, PROGRAM=program, R=WORDS // wide, W=wide,
        K=last.columns, **last.form, RUNS=max(1, last.second.shape[-1]), OTHERS=others, PDL=pdl, num_warps=1,
        launch_pdl=pdl,
    )  # fmt: skip
    return y.to(x.dtype)
