"""What a chunk of 64 tokens of Kimi delta attention is made of, before any order of chunks matters.

With G_t, the sum of the logarithms of decays up to token t of the chunk:

    A_tj = k_t . (k_j * exp(G_t - G_j)) for j < t;  B_tj the same with q_t, for j <= t;  T = (1 + beta A)^-1 beta

64 tokens may decay by exp(-320). So A and B are made in blocks of 16 columns: rows are multiplied by exp(G_t - R),
columns by exp(R - G_j), where R is G in the middle of the block. With decays of at least exp(-10) a token both factors
stay below exp(80), and what underflows is smaller than exp(-18). T is found by substitution, in fp32: in the diagonal
blocks row by row, then block by block. Powers of A would cancel each other where keys are alike.

Reference: `run_delta` in delta.py. Serves heads of up to 128 dimensions, requests of any lengths; those of few tokens
have no chunks. Products take two BF16 numbers of each factor, 16 bits, and add up in fp32. Next: chunks.py.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.kernels.activations import dot, split_in_two
from saccade.kernels.launch import begin, wait
from saccade.kernels.recurrent.delta import DeltaWeights
from saccade.kernels.recurrent.gates import Gates
from saccade.kernels.recurrent.tokens import DELTA_EPS, Where, convolve

CHUNK = tl.constexpr(64)
BLOCK = tl.constexpr(16)  # columns of A and B that share an R
LEAST_BOUND = -10.0  # of a decay's logarithm: 8 tokens from the middle of a block are exp(80)


class TermsConfig(NamedTuple):
    """How the work is divided. Fewer warps spill registers."""

    term_warps: int = 8
    solve_warps: int = 8


class Terms(NamedTuple):
    """Of each chunk and head; pairs are BF16 numbers, high before low."""

    keys: Tensor  # f32 [chunks, heads, 64, dim], normalised
    sums: Tensor  # f32 [chunks, heads, 64, dim]: G
    queries: Tensor  # pairs [chunks, heads, 2, 64, dim]: Q * exp G
    ends: Tensor  # pairs [chunks, heads, 2, 64, dim]: K * exp(G_64 - G)
    among: Tensor  # f32 [chunks, heads, 64, 64]: beta A
    answers: Tensor  # pairs [chunks, heads, 2, 64, 64]: B
    solved: Tensor  # pairs [chunks, heads, 2, 64, dim]: T (K * exp G)
    values: Tensor  # f32 [chunks, heads, 64, dim]: Q, then T V


@triton.jit
def _store_pair(at, apart, x, mask):
    high, low = split_in_two(x, tl.bfloat16)
    tl.store(at, high, mask=mask)
    tl.store(at + apart, low, mask=mask)


@triton.jit
def dot_pairs(a_high, a_low, b_high, b_low, total):
    """total + (a_high + a_low) @ (b_high + b_low), but for what both low numbers give: below 2^-16."""
    return dot(a_high, b_high, dot(a_high, b_low, dot(a_low, b_high, total)))


@triton.jit
def _dot_exact(a, b):
    """a @ b in fp32, of small blocks."""
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def count_chunks(query_start, R, MOST: tl.constexpr, BR: tl.constexpr):
    """i32 [BR] chunks of each of the first R requests; 0 of the others, and of those with up to MOST tokens."""
    request = tl.arange(0, BR)
    here = request < R
    tokens = tl.load(query_start + request + 1, mask=here, other=0) - tl.load(query_start + request, mask=here, other=0)
    return tl.where(tokens > MOST, (tokens + CHUNK - 1) // CHUNK, 0).to(tl.int32)


@triton.jit
def _find_chunk(chunk, query_start, R, MOST: tl.constexpr, BR: tl.constexpr):
    """(request, first chunk of the request) of a chunk; R for one that is none."""
    request = tl.arange(0, BR)
    counts = count_chunks(query_start, R, MOST, BR)
    ends = tl.cumsum(counts, 0)
    found = tl.sum((ends <= chunk).to(tl.int32), 0)
    return tl.minimum(found, R), tl.sum(tl.where(request < found, counts, 0), 0)


@triton.jit(do_not_specialize=["R"])
def _make_terms(
    qkv, decays, betas, filters, places, positions, query_start, recent, keys, sums, queries, ends, among, answers,
    values, R, stride, limit, SCALE: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, BK: tl.constexpr,
    BR: tl.constexpr, WIDTH: tl.constexpr, RING: tl.constexpr, UNIT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    begin(PDL)
    wait(PDL)
    stride *= UNIT
    N: tl.constexpr = HEADS * DIM
    ROW: tl.constexpr = 4 * N + HEADS
    chunk, head = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    request, before = _find_chunk(chunk, query_start, R, RING - WIDTH + 1, BR)
    place = tl.load(places + request, mask=request < R, other=0)
    if place > 0:
        first = tl.load(query_start + request)
        count = (tl.load(query_start + request + 1) - first).to(tl.int32)
        past = (chunk - before) * CHUNK  # tokens of the request in chunks before
        start = tl.load(positions + first).to(tl.int32) + past
        recent += place * RING * ROW
        row, column = tl.arange(0, CHUNK), tl.arange(0, BK)
        end = count - past
        there = row < end
        known = (column < DIM)[None, :]
        inside = there[:, None] & known
        first += past
        rows, channel, at = qkv + first * stride, head * DIM, row[:, None]
        decay = tl.load(decays + first * N + channel + row[:, None] * N + column[None, :], mask=inside, other=0.0)
        total = tl.cumsum(decay, 0)
        last = tl.sum(decay, 0)[None, :]
        k = convolve(rows, stride, -past, end, recent, start, filters, at, column[None, :], known, N + channel, WIDTH,
                     RING, ROW, UNIT % 4 == 0)  # fmt: skip
        k = k / tl.sqrt(tl.sum(k * k, 1) + DELTA_EPS)[:, None]
        begins = tl.program_id(0).to(tl.int64) * CHUNK * BK
        cell = row[:, None] * BK + column[None, :]
        tl.store(keys + begins + cell, k)
        tl.store(sums + begins + cell, total)
        _store_pair(ends + 2 * begins + cell, CHUNK * BK, k * tl.exp(last - total), None)
        q = convolve(rows, stride, -past, end, recent, start, filters, at, column[None, :], known, channel, WIDTH,
                     RING, ROW, UNIT % 4 == 0)  # fmt: skip
        q = q / tl.sqrt(tl.sum(q * q, 1) + DELTA_EPS)[:, None] * SCALE
        _store_pair(queries + 2 * begins + cell, CHUNK * BK, q * tl.exp(total), None)
        tl.store(values + begins + cell, q)  # their place until there are values
        tl.debug_barrier()  # all three are read again, block by block: no register holds them meanwhile
        square = tl.program_id(0).to(tl.int64) * CHUNK * CHUNK
        small = tl.arange(0, BLOCK)
        beta = tl.load(betas + first * HEADS + head + row * HEADS, mask=there, other=0.0)
        zeros = tl.zeros([CHUNK, BLOCK], tl.float32)
        for block in range(CHUNK // BLOCK):
            j = block * BLOCK + small
            line = begins + j[:, None] * BK + column[None, :]
            middle = tl.load(sums + begins + (block * BLOCK + BLOCK // 2) * BK + column)[None, :]
            right = tl.trans(tl.load(keys + line) * tl.exp(middle - tl.load(sums + line)))  # [dim, 16]
            right_high, right_low = split_in_two(right, tl.bfloat16)
            # Larger than the limit only in front of the block, which is left out below.
            factor = tl.exp(tl.minimum(tl.load(sums + begins + cell) - middle, limit))
            high, low = split_in_two(tl.load(keys + begins + cell) * factor, tl.bfloat16)
            a = dot_pairs(high, low, right_high, right_low, zeros) * beta[:, None]
            tl.store(among + square + row[:, None] * CHUNK + j[None, :], tl.where(row[:, None] > j[None, :], a, 0.0))
            high, low = split_in_two(tl.load(values + begins + cell) * factor, tl.bfloat16)
            b = dot_pairs(high, low, right_high, right_low, zeros)
            b = tl.where(row[:, None] >= j[None, :], b, 0.0)
            _store_pair(answers + 2 * square + row[:, None] * CHUNK + j[None, :], CHUNK * CHUNK, b, None)


@triton.jit
def _load_block(at, i: tl.constexpr, j: tl.constexpr):
    row, column = tl.arange(0, BLOCK), tl.arange(0, BLOCK)
    return tl.load(at + (row + i * BLOCK)[:, None] * CHUNK + (column + j * BLOCK)[None, :])


@triton.jit
def _store_block(at, i: tl.constexpr, j: tl.constexpr, x):
    row, column = tl.arange(0, BLOCK), tl.arange(0, BLOCK)
    tl.store(at + (row + i * BLOCK)[:, None] * CHUNK + (column + j * BLOCK)[None, :], x)


@triton.jit
def _load_line(at, i: tl.constexpr, row):
    """Row `row` of diagonal block i."""
    return tl.load(at + (row + i * BLOCK) * CHUNK + (tl.arange(0, BLOCK) + i * BLOCK))


@triton.jit
def _substitute(inverse, line, i):
    """Row i of the inverse of 1 + a lower triangle whose row i is `line`; rows above are known."""
    row = tl.arange(0, BLOCK)
    new = (row == i).to(tl.float32) - tl.sum(line[:, None] * inverse, 0)
    return tl.where((row == i)[:, None], new[None, :], inverse)


@triton.jit(do_not_specialize=["R"])
def _solve_chunks(
    qkv, betas, filters, places, positions, query_start, recent, keys, sums, among, solved, values, R, stride,
    HEADS: tl.constexpr, DIM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, WIDTH: tl.constexpr,
    RING: tl.constexpr, UNIT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    begin(PDL)
    wait(PDL)
    stride *= UNIT
    N: tl.constexpr = HEADS * DIM
    ROW: tl.constexpr = 4 * N + HEADS
    chunk, head = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    request, before = _find_chunk(chunk, query_start, R, RING - WIDTH + 1, BR)
    place = tl.load(places + request, mask=request < R, other=0)
    if place > 0:
        square = among + tl.program_id(0).to(tl.int64) * CHUNK * CHUNK
        small = tl.arange(0, BLOCK)
        t00 = (small[:, None] == small[None, :]).to(tl.float32)
        t11, t22, t33 = t00, t00, t00
        for i in range(1, BLOCK):
            t00 = _substitute(t00, _load_line(square, 0, i), i)
            t11 = _substitute(t11, _load_line(square, 1, i), i)
            t22 = _substitute(t22, _load_line(square, 2, i), i)
            t33 = _substitute(t33, _load_line(square, 3, i), i)
        a10, a20, a21 = _load_block(square, 1, 0), _load_block(square, 2, 0), _load_block(square, 2, 1)
        a30, a31, a32 = _load_block(square, 3, 0), _load_block(square, 3, 1), _load_block(square, 3, 2)
        t10 = -_dot_exact(t11, _dot_exact(a10, t00))
        t21 = -_dot_exact(t22, _dot_exact(a21, t11))
        t32 = -_dot_exact(t33, _dot_exact(a32, t22))
        t20 = -_dot_exact(t22, _dot_exact(a20, t00) + _dot_exact(a21, t10))
        t31 = -_dot_exact(t33, _dot_exact(a31, t11) + _dot_exact(a32, t21))
        t30 = -_dot_exact(t33, _dot_exact(a30, t00) + _dot_exact(a31, t10) + _dot_exact(a32, t20))
        tl.debug_barrier()  # before `among` becomes the inverse
        _store_block(square, 0, 0, t00)
        _store_block(square, 1, 0, t10)
        _store_block(square, 1, 1, t11)
        _store_block(square, 2, 0, t20)
        _store_block(square, 2, 1, t21)
        _store_block(square, 2, 2, t22)
        _store_block(square, 3, 0, t30)
        _store_block(square, 3, 1, t31)
        _store_block(square, 3, 2, t32)
        _store_block(square, 3, 3, t33)
        tl.debug_barrier()
        first = tl.load(query_start + request)
        count = (tl.load(query_start + request + 1) - first).to(tl.int32)
        past = (chunk - before) * CHUNK
        start = tl.load(positions + first).to(tl.int32) + past
        recent += place * RING * ROW
        row, column = tl.arange(0, CHUNK), tl.arange(0, BK)
        first += past
        there = row < count - past
        beta = tl.load(betas + first * HEADS + head + row * HEADS, mask=there, other=0.0)
        # what lies above the diagonal is zero already
        inverse = tl.load(square + row[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :])
        high, low = split_in_two(inverse, tl.bfloat16)
        cell = tl.program_id(0).to(tl.int64) * CHUNK * BK + row[:, None] * BK + column[None, :]
        zeros = tl.zeros([CHUNK, BK], tl.float32)
        k = tl.load(keys + cell) * tl.exp(tl.load(sums + cell)) * beta[:, None]
        k_high, k_low = split_in_two(k, tl.bfloat16)
        pair = tl.program_id(0).to(tl.int64) * 2 * CHUNK * BK + row[:, None] * BK + column[None, :]
        _store_pair(solved + pair, CHUNK * BK, dot_pairs(high, low, k_high, k_low, zeros), None)
        rows, known = qkv + first * stride, (column < DIM)[None, :]
        v = convolve(rows, stride, -past, count - past, recent, start, filters, row[:, None], column[None, :], known,
                     2 * N + head * DIM, WIDTH, RING, ROW, UNIT % 4 == 0)  # fmt: skip
        v_high, v_low = split_in_two(v * beta[:, None], tl.bfloat16)
        tl.store(values + cell, dot_pairs(high, low, v_high, v_low, zeros))


def make_terms(
    qkv: Tensor, gates: Gates, delta: DeltaWeights, recent: Tensor, where: Where, chunks: int, shape: Mapping[str, Any],
    config: TermsConfig | None = None,
) -> Terms:  # fmt: skip
    """Of up to `chunks` chunks, in the order of requests. `shape`: what chunks.py gives all of its kernels."""
    how, requests, heads = config or TermsConfig(), len(where.places), delta.heads
    stride = qkv.stride(0) // shape["UNIT"]
    terms = allot_terms(chunks, heads, shape["BK"], qkv.device)
    _make_terms[chunks * heads,](
        qkv, gates.decays, gates.betas, delta.conv, *where, recent, terms.keys, terms.sums, terms.queries, terms.ends,
        terms.among, terms.answers, terms.values, requests, stride, -8 * delta.lower_bound, SCALE=delta.dim**-0.5,
        **shape, num_warps=how.term_warps, num_stages=1,
    )  # fmt: skip
    _solve_chunks[chunks * heads,](
        qkv, gates.betas, delta.conv, *where, recent, terms.keys, terms.sums, terms.among, terms.solved, terms.values,
        requests, stride, **shape, num_warps=how.solve_warps, num_stages=1,
    )  # fmt: skip
    return terms


def allot_terms(chunks: int, heads: int, dim: int, device: torch.device) -> Terms:
    size = CHUNK.value

    def numbers(width: int) -> Tensor:
        return torch.empty(chunks, heads, size, width, device=device)

    def pairs(width: int) -> Tensor:
        return torch.empty(chunks, heads, 2, size, width, dtype=torch.bfloat16, device=device)

    return Terms(
        numbers(dim), numbers(dim), pairs(dim), pairs(dim), numbers(size), pairs(size), pairs(dim), numbers(dim)
    )
