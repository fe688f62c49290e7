"""The second half of a mixture of experts, or of a dense MLP, for up to 32 tokens: down, into the residual.

One program sums an output row of a token: over its experts in the order of the choice, then over the shared experts.
For one or two tokens a program holds all its codes before the hidden units arrive: 5.6 us instead of 9.9 behind
gate_up. For more tokens, codes stream through shared memory as in gate_up.py, and the same rows of all tokens come one
after the other: 33 us instead of 38 at 8 tokens.

Reference: `expert_mlp` and `gated_mlp` in reference.py. Serves up to PAIR_TOKENS tokens; weights in FP8 by 128 x 128,
BF16 or F32. Next: grouped_gemm.py, for more tokens.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.kernels.launch import begin, uses_pdl, wait
from saccade.kernels.linear.row_chunks import (
    StoredMatrix,
    as_stored,
    find_chunking,
    load_chunk,
    load_input,
    load_scales,
    multiply_chunk,
    to_numbers,
)
from saccade.kernels.moe.gate_up import RUN, multiply_run
from saccade.kernels.residual import PreparedResidual, store_residual
from saccade.kernels.types import SCALE_BLOCK, Chosen, Matrix, Norm

FEW_ROWS = 8  # of the output, a program of one or two tokens


class DownConfig(NamedTuple):
    """How the work of several tokens is divided."""

    tile_bytes: int = 8192  # of a chunk of all rows of a program
    columns: int = 512  # of a chunk, at most
    warps: int = 2
    stages: int = 3


SEVERAL = DownConfig()


@triton.jit
def _down_few(
    x, hidden, ids, weights, out, w, scale, shared, shared_scale, next_gain, scaled, parts, ROWS, N, SHARED_N,
    TOPK: tl.constexpr, BN: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, CODED: tl.constexpr,
    EVEN: tl.constexpr, SHARED_CHUNK: tl.constexpr, SHARED_CHUNKS: tl.constexpr, SHARED_CODED: tl.constexpr,
    SHARED_EVEN: tl.constexpr, TOKENS: tl.constexpr, OTHERS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out[row] = x[row] + sum over experts of weight * (down[row] . hidden) + shared[row] . hidden, in this order, for
    one of few tokens. All codes of a program are in registers before `run_gate_up` ends."""
    begin(PDL)
    program, token = tl.program_id(0) // TOKENS, tl.program_id(0) % TOKENS
    hidden += token * (TOPK * N + SHARED_N)
    ids += token * TOPK
    weights += token * TOPK
    x += token * ROWS
    out += token * ROWS
    scaled += token * ROWS
    parts += token * (tl.num_programs(0) // TOKENS) + program
    first = program * BN
    row = first + tl.arange(0, BN)
    held = load_chunk(shared, row, ROWS, 0, SHARED_N, SHARED_CHUNK, SHARED_EVEN)
    shared_scale += (first // 128) * tl.cdiv(SHARED_N, 128)
    scale += (first // 128) * tl.cdiv(N, 128)
    chunks, factors, owned = (), (), ()
    for i in tl.static_range(TOPK):  # known since before gate_up; all of them are asked for before the first is used
        expert = tl.load(ids + i, cache_modifier=".cg")
        owned = owned + (expert >= 0,)
        its_rows = ROWS
        if OTHERS:
            its_rows = tl.where(expert < 0, 0, ROWS)  # nothing is read of another rank's expert
            expert = tl.maximum(expert, 0)
        its_scale = scale + expert * tl.cdiv(ROWS, 128) * tl.cdiv(N, 128)
        for j in tl.static_range(CHUNKS):
            chunk = load_chunk(w + expert.to(tl.int64) * ROWS * N, row, its_rows, j * CHUNK, N, CHUNK, EVEN)
            chunks = chunks + (chunk,)
            factors = factors + (load_scales(its_scale, j * CHUNK, N, CHUNK, CODED),)
    gains = tl.load(next_gain + row, mask=row < ROWS, other=0.0)
    wait(PDL)
    y = tl.load(x + row, mask=row < ROWS, other=0.0)
    if TOPK > 0:
        sums = tl.zeros([CHUNK // 4, BN], tl.float32)
        for i in tl.static_range(TOPK):
            weight = tl.load(weights + i)
            for j in tl.static_range(CHUNKS):
                a = load_input(hidden + i * N, j * CHUNK, N, CHUNK, EVEN) * weight
                if OTHERS:
                    a = tl.where(owned[i], a, 0.0)  # what was not computed may be NaN
                sums += multiply_chunk(chunks[i * CHUNKS + j], a, factors[i * CHUNKS + j], CODED)
        y += tl.sum(sums, 0)
    hidden += TOPK * N
    sums_shared = tl.zeros([SHARED_CHUNK // 4, BN], tl.float32)
    for j in tl.static_range(SHARED_CHUNKS):
        a = load_input(hidden, j * SHARED_CHUNK, SHARED_N, SHARED_CHUNK, SHARED_EVEN)
        s = load_scales(shared_scale, j * SHARED_CHUNK, SHARED_N, SHARED_CHUNK, SHARED_CODED)
        if j > 0:
            held = load_chunk(shared, row, ROWS, j * SHARED_CHUNK, SHARED_N, SHARED_CHUNK, SHARED_EVEN)
        sums_shared += multiply_chunk(held, a, s, SHARED_CODED)
    y += tl.sum(sums_shared, 0)
    store_residual(y, out, row, ROWS, gains, scaled, parts)


@triton.jit
def _down(
    x, hidden, ids, weights, out, w, scale, shared, shared_scale, HEIGHT, N: tl.constexpr, SHARED_N: tl.constexpr,
    TOPK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SHARED_COLUMNS: tl.constexpr, STAGES: tl.constexpr,
    CODED: tl.constexpr, SHARED_CODED: tl.constexpr, OTHERS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The same sum for ROWS of HEIGHT rows of any token."""
    token, first = tl.program_id(0), tl.program_id(1) * ROWS
    row = first + tl.arange(0, ROWS)
    there = (row < HEIGHT)[:, None]
    hidden += token * (TOPK * N + SHARED_N)
    scale += (first // 128) * tl.cdiv(N, 128)
    shared_scale += (first // 128) * tl.cdiv(SHARED_N, 128)
    shared_column = tl.arange(0, SHARED_COLUMNS)
    shared_at = shared + row[:, None] * SHARED_N + shared_column[None, :]
    held = tl.load(shared_at, mask=there & (shared_column < SHARED_N)[None, :], other=0)
    wait(PDL)
    begin(PDL)
    y = tl.load(x + token * HEIGHT + row, mask=row < HEIGHT, other=0.0)
    if TOPK > 0:
        column = tl.arange(0, COLUMNS)
        place = row[:, None] * N + column[None, :]
        CHUNKS: tl.constexpr = (N + COLUMNS - 1) // COLUMNS
        sums = tl.zeros([ROWS, COLUMNS // RUN], tl.float32)
        for step in tl.range(0, TOPK * CHUNKS, num_stages=STAGES):
            i, start = step // CHUNKS, step % CHUNKS * COLUMNS
            inside = column < N - start
            expert = tl.load(ids + token * TOPK + i)
            if OTHERS:
                inside = column < tl.where(expert < 0, 0, N - start)
                expert = tl.maximum(expert, 0)
            chunk = w + expert.to(tl.int64) * HEIGHT * N + start
            codes = tl.load(chunk + place, mask=there & inside[None, :], other=0)
            s = load_scales(scale + expert * tl.cdiv(HEIGHT, 128) * tl.cdiv(N, 128), start, N, COLUMNS, CODED, RUN)
            a = tl.load(hidden + i * N + start + column, mask=inside, other=0.0)
            weight = tl.load(weights + token * TOPK + i)
            sums += multiply_run(to_numbers(codes, CODED), a * weight, s, ROWS, COLUMNS)
        y += tl.sum(sums, 1)
    hidden += TOPK * N
    sums = tl.zeros([ROWS, SHARED_COLUMNS // RUN], tl.float32)
    for start in tl.static_range(0, SHARED_N, SHARED_COLUMNS):
        inside = shared_column < SHARED_N - start
        codes = held if start == 0 else tl.load(shared_at + start, mask=there & inside[None, :], other=0)
        a = tl.load(hidden + start + shared_column, mask=inside, other=0.0)
        s = load_scales(shared_scale, start, SHARED_N, SHARED_COLUMNS, SHARED_CODED, RUN)
        sums += multiply_run(to_numbers(codes, SHARED_CODED), a, s, ROWS, SHARED_COLUMNS)
    y += tl.sum(sums, 1)
    tl.store(out + token * HEIGHT + row, y, mask=row < HEIGHT)


def run_down(
    x: Tensor,
    hidden: Tensor,
    down: Matrix,
    chosen: Chosen | None = None,
    experts: Matrix | None = None,
    config: DownConfig | None = None,
    others: bool = False,
) -> Tensor:
    """f32 [T, k] = x + sum of weight * (down . hidden) over the experts `chosen` + the shared ones'.

    down: [k, shared n]; experts: [experts, k, n]; hidden: what `run_gate_up` gave. others: whether some of the ids are
    -1, experts of other ranks, which add nothing.
    """
    shared, held, topk, n = _take(down, chosen, experts)
    config = config or SEVERAL
    ids, weights = chosen if chosen is not None else (x, x)
    height, shared_n = shared.data.shape
    columns, shared_columns = (min(config.columns, max(16, triton.next_power_of_2(c))) for c in (n, shared_n))
    item = max(o.data.element_size() for o in (shared, held))
    rows = max(1, min(SCALE_BLOCK, config.tile_bytes // (max(columns, shared_columns) * item)))
    out, uses = torch.empty_like(x), uses_pdl(x)
    _down[(len(x), -(-height // rows))](
        x, hidden, ids, weights, out, held.data, held.scale, shared.data, shared.scale, height, N=n if topk else 0,
        SHARED_N=shared_n, TOPK=topk, ROWS=rows, COLUMNS=columns, SHARED_COLUMNS=shared_columns, STAGES=config.stages,
        CODED=held.is_coded, SHARED_CODED=shared.is_coded, OTHERS=others, PDL=uses, num_warps=config.warps,
        launch_pdl=uses,
    )  # fmt: skip
    return out


def run_down_into(
    x: Tensor,
    hidden: Tensor,
    down: Matrix,
    chosen: Chosen | None,
    experts: Matrix | None,
    following: Norm,
    rows: int | None = None,
    others: bool = False,
) -> PreparedResidual:
    """The same for up to GEMV_TOKENS tokens, prepared for the norm that follows.

    `run_gate_up` must be the launch before: the choice of experts is read while it runs.
    """
    shared, held, topk, n = _take(down, chosen, experts)
    rows = rows or FEW_ROWS
    ids, weights = chosen if chosen is not None else (x, x)
    k, shared_n = shared.data.shape
    its, common = find_chunking(n, 512), find_chunking(shared_n, 512)
    warps = max(its.warps if topk else 1, 2)
    out, scaled, programs, uses = torch.empty_like(x), torch.empty_like(x), -(-k // rows), uses_pdl(x)
    squares = x.new_empty(len(x), programs)
    _down_few[len(x) * programs,](
        x, hidden, ids, weights, out, held.data, held.scale, shared.data, shared.scale, following.weight, scaled,
        squares, k, n if topk else 0, shared_n, TOPK=topk, BN=rows, CHUNK=its.width, CHUNKS=its.chunks,
        CODED=held.is_coded, EVEN=its.is_even, SHARED_CHUNK=common.width, SHARED_CHUNKS=common.chunks,
        SHARED_CODED=shared.is_coded, SHARED_EVEN=common.is_even, TOKENS=len(x), OTHERS=others, PDL=uses,
        num_warps=warps,
        launch_pdl=uses,
    )  # fmt: skip
    return PreparedResidual(out, scaled, squares)


def _take(down: Matrix, chosen: Chosen | None, experts: Matrix | None) -> tuple[StoredMatrix, StoredMatrix, int, int]:
    """Shared and routed matrices, how many experts a token has, and their hidden units."""
    shared = as_stored(down)
    held = shared if experts is None else as_stored(experts)
    topk = 0 if chosen is None else chosen[0].shape[1]
    return shared, held, topk, held.data.shape[-1] if topk else SCALE_BLOCK
