"""silu(gate) * up for up to 32 tokens: the first half of a mixture of experts, or of a dense MLP.

A program owns a few hidden units of one of a token's experts, or of the shared experts, which from five tokens on four
tokens take together. Codes stream through shared memory, two or three chunks ahead of the one that is multiplied, in
fp32 FMAs. Tokens that chose the same expert read it again, but soon, while L2 has it: the same units of all pairs come
before the next units.

Reference: `expert_mlp` and `gated_mlp` in reference.py. Serves up to PAIR_TOKENS tokens; weights in FP8 by 128 x 128,
BF16 or F32. Measured at 8 tokens: 56 us; 58 us with pair after pair; 97 us with all of a program's codes in registers
before the first product. At 16 tokens: 98 us; 107 us with pair after pair. Programs that served all tokens of their
expert lost more than they read less: 22.3 ms a step at batch 8 instead of 15.8 with FMAs, 76 us instead of 63 on tensor
cores. Next: down.py.
"""

import functools
from math import inf
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.kernels.activations import clamp_gate
from saccade.kernels.launch import begin, uses_pdl, wait
from saccade.kernels.linear.row_chunks import as_stored, load_scales, to_numbers
from saccade.kernels.residual import AHEAD, NOT, Input, PreparedResidual, find_factor, load_squares, take_input
from saccade.kernels.types import SCALE_BLOCK, Matrix, Norm

RUN = tl.constexpr(16)  # codes of a thread: one load of 16 bytes


class GateUpConfig(NamedTuple):
    """How the work is divided."""

    units: int  # hidden units of a program, each of which is two rows
    columns: int  # of a chunk
    warps: int
    stages: int = 4
    together: int = 4  # tokens that share what a program of the shared experts reads and decodes


# What was fastest on an H200 for up to so many tokens. Programs of the shared experts want more registers the more
# tokens they have together, and all others get as many; so these have no simple order.
ONE_TOKEN, TWO_TOKENS, FOUR_TOKENS = (
    GateUpConfig(4, 1024, 4),
    GateUpConfig(16, 512, 4, 3, 1),
    GateUpConfig(16, 512, 2, 3, 1),
)
EIGHT_TOKENS, MORE_TOKENS = GateUpConfig(16, 512, 4, 3), GateUpConfig(32, 256, 4, 3)


def choose_config(tokens: int) -> GateUpConfig:
    if tokens <= 4:
        return (ONE_TOKEN, TWO_TOKENS, FOUR_TOKENS, FOUR_TOKENS)[tokens - 1]
    return EIGHT_TOKENS if tokens <= 8 else MORE_TOKENS


@triton.jit
def multiply_run(numbers, a, scales, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """f32 [ROWS, COLUMNS / 16]: each thread's part of numbers [ROWS, COLUMNS] @ a [COLUMNS], scaled by its scales."""
    return tl.sum(tl.reshape(numbers * a[None, :], [ROWS, COLUMNS // RUN, RUN]), 2) * scales[None, :]


@triton.jit
def _gate_up_units(
    x, squares, eps, out, out_stride, last, w, scale, N, first, K: tl.constexpr, UNITS: tl.constexpr,
    COLUMNS: tl.constexpr, STAGES: tl.constexpr, CODED: tl.constexpr, NORM: tl.constexpr, COUNT: tl.constexpr,
    COUNT_UP: tl.constexpr, TOKENS: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """out[t, i] = silu(gate_i . x[t]) * (up_i . x[t]) for UNITS units from `first` on; up rows lie N below. TOKENS
    share what is read and decoded, those after `last` are none. With NORM = AHEAD both products are still to be
    multiplied by the norm's factor."""
    unit, column = first + tl.arange(0, UNITS), tl.arange(0, COLUMNS)
    there = (unit < N)[:, None]
    gate_at = w + unit[:, None] * K + column[None, :]
    up_at = gate_at + N * K
    gate_scale = scale + (first // 128) * tl.cdiv(K, 128)
    up_scale = scale + ((N + first) // 128) * tl.cdiv(K, 128)
    gate, up = (), ()
    for _ in tl.static_range(TOKENS):
        gate = gate + (tl.zeros([UNITS, COLUMNS // RUN], tl.float32),)
        up = up + (tl.zeros([UNITS, COLUMNS // RUN], tl.float32),)
    if NORM == AHEAD:
        parts = load_squares(squares, COUNT, COUNT_UP)
    for start in tl.range(0, K, COLUMNS, num_stages=STAGES):
        inside = column < K - start
        gates = tl.load(gate_at + start, mask=there & inside[None, :], other=0)
        ups = tl.load(up_at + start, mask=there & inside[None, :], other=0)
        gate_scales = load_scales(gate_scale, start, K, COLUMNS, CODED, RUN)
        up_scales = load_scales(up_scale, start, K, COLUMNS, CODED, RUN)
        gates, ups = to_numbers(gates, CODED), to_numbers(ups, CODED)
        more_gate, more_up = (), ()
        for t in tl.static_range(TOKENS):
            a = tl.load(x + tl.minimum(t, last) * K + start + column, mask=inside, other=0.0)
            more_gate = more_gate + (gate[t] + multiply_run(gates, a, gate_scales, UNITS, COLUMNS),)
            more_up = more_up + (up[t] + multiply_run(ups, a, up_scales, UNITS, COLUMNS),)
        gate, up = more_gate, more_up
    for t in tl.static_range(TOKENS):
        g, u = tl.sum(gate[t], 1), tl.sum(up[t], 1)
        if NORM == AHEAD:
            factor = find_factor(parts, K, eps)
            g, u = g * factor, u * factor
        g, u = clamp_gate(g, u, LIMIT)
        end = N if TOKENS == 1 else N * tl.minimum(last + 1 - t, 1)  # nothing of a token after the last
        tl.store(out + t * out_stride + unit, g * tl.sigmoid(g) * u, mask=unit < end)


@triton.jit
def _gate_up(
    x, squares, ids, out, w, scale, shared, shared_scale, T, N, SHARED_N, eps, K: tl.constexpr, TOPK: tl.constexpr,
    UNITS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr, CODED: tl.constexpr, SHARED_CODED: tl.constexpr,
    NORM: tl.constexpr, COUNT: tl.constexpr, COUNT_UP: tl.constexpr, TOGETHER: tl.constexpr, SEVERAL: tl.constexpr,
    OTHERS: tl.constexpr, LIMIT: tl.constexpr, SHARED_LIMIT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    shared_programs = tl.cdiv(SHARED_N, UNITS)
    groups = tl.cdiv(T, TOGETHER)
    width = TOPK * N + SHARED_N
    SQUARES: tl.constexpr = COUNT if SEVERAL else 0  # from token to token; known to be 0, one token takes 0.4 us less
    wait(PDL)
    begin(PDL)  # not earlier: what comes next may read the choice before it waits for this kernel
    if program < groups * shared_programs:
        token, first = program // shared_programs * TOGETHER, program % shared_programs * UNITS
        squares += token * SQUARES
        _gate_up_units(x + token * K, squares, eps, out + token * width + TOPK * N, width, T - 1 - token, shared,
                      shared_scale, SHARED_N, first, K, UNITS, COLUMNS, STAGES, SHARED_CODED, NORM, COUNT, COUNT_UP,
                      TOGETHER, SHARED_LIMIT)  # fmt: skip
    else:
        if TOPK > 0:
            program -= groups * shared_programs
            pair, first = program % (T * TOPK), program // (T * TOPK) * UNITS
            token = pair // TOPK
            squares += token * SQUARES
            expert = tl.load(ids + pair)
            is_own = True
            if OTHERS:
                is_own = expert >= 0
            if is_own:
                w += expert.to(tl.int64) * 2 * N * K
                scale += expert * tl.cdiv(2 * N, 128) * tl.cdiv(K, 128)
                _gate_up_units(x + token * K, squares, eps, out + token * width + pair % TOPK * N, width, 0, w, scale,
                              N, first, K, UNITS, COLUMNS, STAGES, CODED, NORM, COUNT, COUNT_UP, 1, LIMIT)  # fmt: skip


@functools.cache
def shares_scales(n: int, units: int) -> bool:
    """Whether the rows of a program's `units` lie in one block, in the gate's n rows and in those of `up` behind it."""
    spans = [(a, min(a + units, n) - 1) for a in range(0, n, units)]
    return all((base + a) // SCALE_BLOCK == (base + b) // SCALE_BLOCK for base in (0, n) for a, b in spans)


def run_gate_up(
    x: Input,
    norm: Norm | None,
    gate_up: Matrix,
    ids: Tensor | None = None,
    experts: Matrix | None = None,
    config: GateUpConfig | None = None,
    others: bool = False,
    limits: tuple[float, float] = (inf, inf),
) -> Tensor:
    """Hidden units silu(gate) * up, f32 [T, topk * n + shared n]: those of the experts `ids` i32 [T, topk], in that
    order, then the shared ones.

    x: f32 [T, k]; or a PreparedResidual, and the `norm` it was prepared for. gate_up [2 * shared n, k] is every
    token's, experts [experts, 2n, k] are chosen from; without them this is a dense MLP's first half. others: whether
    some ids are -1, experts of other ranks, whose units are left unwritten. limits: of `silu_and_mul`, for the
    shared experts and for those that are chosen.
    """
    assert isinstance(x, PreparedResidual) == (norm is not None), "a tensor is normalised already"
    given, squares, count, mode = take_input(x, norm)
    tokens, k = given.shape
    how = config or choose_config(tokens)
    assert SCALE_BLOCK % how.units == 0, f"{how.units} units of a program have more than one scale"
    columns = min(how.columns, max(16, triton.next_power_of_2(k)))
    shared = as_stored(gate_up)
    routed = shared if experts is None else as_stored(experts)
    topk = 0 if ids is None else ids.shape[1]
    shared_n, n = shared.data.shape[0] // 2, routed.data.shape[-2] // 2 if topk else 0
    assert not shared.is_coded or shares_scales(shared_n, how.units), f"{shared_n} units: a program has several scales"
    assert not routed.is_coded or shares_scales(n, how.units), f"{n} units: a program of experts has several scales"
    out = torch.empty(tokens, topk * n + shared_n, dtype=torch.float32, device=given.device)
    uses = uses_pdl(given)
    together = min(how.together, triton.next_power_of_2(tokens))
    assert together == 1 or mode == NOT.value, "tokens that share a program share the norm's factor"
    groups, pairs = -(-tokens // together), tokens * topk
    _gate_up[groups * -(-shared_n // how.units) + pairs * -(-n // how.units),](
        given, squares, out if ids is None else ids, out, routed.data, routed.scale, shared.data, shared.scale,
        tokens, n, shared_n, norm.eps if norm else 0.0, K=k, TOPK=topk, UNITS=how.units, COLUMNS=columns,
        STAGES=how.stages, CODED=routed.is_coded, SHARED_CODED=shared.is_coded, NORM=mode, COUNT=count,
        COUNT_UP=triton.next_power_of_2(count), TOGETHER=together, SEVERAL=tokens > 1, OTHERS=others,
        LIMIT=limits[1], SHARED_LIMIT=limits[0], PDL=uses,
        num_warps=how.warps, launch_pdl=uses,
    )  # fmt: skip
    return out
