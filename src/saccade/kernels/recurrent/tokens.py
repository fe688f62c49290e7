"""Kimi delta attention of few tokens a request, one after the other: decoding, drafts, the ends of prompts.

A program holds some columns of one head's matrix in registers: it reads them once, applies the tokens that can no
longer be taken back, both before the step's inputs are there, writes them once, and then answers the step's tokens.
Convolution, SiLU, norms of queries and keys are computed on the way, by every program of a head anew: 9 KB from L2
beside 32 KB of matrix. The last program of a head to finish normalises the head's result, applies the output gate, and
writes the ring and `base`, which the others of that head have read by then.

Reference: `run_delta` in delta.py. Serves any number of requests and of tokens, in fp32; heads of up to 128
dimensions. At 64 heads of 128 a request has to read and write 2 * 4 MiB of matrices and 0.6 MB beside: 9.0 MB, 1.9 us
at 4.8 TB/s. Not measured alone yet. Next: recur.py.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.kernels.launch import begin, uses_pdl, wait
from saccade.kernels.recurrent.delta import NORM_EPS, DeltaState, DeltaWeights
from saccade.kernels.recurrent.gates import Gates
from saccade.kernels.types import Norm

DELTA_EPS = tl.constexpr(NORM_EPS)
BEHIND_ALL = tl.constexpr(1 << 30)  # behind any token


class TokensConfig(NamedTuple):
    """How the work is divided."""

    columns: int  # of a matrix, of a program
    warps: int


# 64 heads of one request: 256 programs of 16 KB. A rank with 8 of them: 64 programs of 8 KB. More requests: fewer
# programs of 32 KB each, which compute fewer convolutions twice. Estimates, by bytes.
COLUMNS_16, COLUMNS_32, COLUMNS_64 = TokensConfig(16, 4), TokensConfig(32, 4), TokensConfig(64, 4)
LEAST_PROGRAMS = 256  # about two a multiprocessor at least


class Where(NamedTuple):
    """Where a step's requests are."""

    places: Tensor  # i64 [R], of states; 0 for padding
    positions: Tensor  # i64 [T]
    query_start: Tensor  # i64 [R + 1]


@triton.jit
def convolve(
    rows, stride, since, end, recent, start, filters, at, channel, inside, first_channel, WIDTH: tl.constexpr,
    RING: tl.constexpr, ROW: tl.constexpr, ALIGNED: tl.constexpr = False,
):  # fmt: skip
    """SiLU of the causal convolution of channels, from `first_channel` on, at tokens `at`. Token 0 is at position
    `start` and has its inputs at `rows`; those before token `since` are in the ring. From token `end` on: zeros. `at`
    is a tensor that broadcasts with `channel`; `inside` says which channels there are. ALIGNED: whether rows begin at
    multiples of 16 bytes."""
    filters += first_channel * WIDTH
    total = tl.load(filters + channel * WIDTH, mask=inside, other=0.0) * 0.0
    for tap in tl.static_range(WIDTH):
        i = at + (tap - WIDTH + 1)
        source = tl.where(i >= since, rows + i * stride, recent + (start + i) % RING * ROW)
        if ALIGNED and ROW % 4 == 0:  # which `where` makes forget
            source = tl.multiple_of(source, [1, 16])
        x = tl.load(source + first_channel + channel, mask=inside & (start + i >= 0) & (at < end), other=0.0)
        total += x * tl.load(filters + channel * WIDTH + tap, mask=inside, other=0.0)
    return total * tl.sigmoid(total)


@triton.jit
def _take_token(
    held, at, rows, stride, decays, betas, recent, start, filters, head, key, value, ASKS: tl.constexpr,
    SCALE: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, RING: tl.constexpr,
):  # fmt: skip
    """The matrix [keys, columns] behind token `at`, and what it answers to the token's query if ASKS."""
    N: tl.constexpr = HEADS * DIM
    ROW: tl.constexpr = 4 * N + HEADS
    inside, when, slot = key < DIM, at + key * 0, recent + (start + at) % RING * ROW
    channel = head * DIM
    k = convolve(rows, stride, 0, BEHIND_ALL, recent, start, filters, when, key, inside, N + channel, WIDTH, RING, ROW)
    v = convolve(rows, stride, 0, BEHIND_ALL, recent, start, filters, at + value * 0, value, value < DIM,
                 2 * N + channel, WIDTH, RING, ROW)  # fmt: skip
    q = k
    if ASKS:  # asked for here: loads are not moved across the sums below
        q = convolve(rows, stride, 0, BEHIND_ALL, recent, start, filters, when, key, inside, channel, WIDTH, RING, ROW)
    decay = tl.load(tl.where(at >= 0, decays + at * N, slot + 3 * N) + channel + key, mask=inside, other=0.0)
    beta = tl.load(tl.where(at >= 0, betas + at * HEADS, slot + 4 * N) + head)
    k = k / tl.sqrt(tl.sum(k * k, 0) + DELTA_EPS)
    held = held * tl.exp(decay)[:, None]
    missing = (v - tl.sum(held * k[:, None], 0)) * beta
    answer = missing
    if ASKS:  # of the matrix before the token is added: both sums at once
        q = q / tl.sqrt(tl.sum(q * q, 0) + DELTA_EPS) * SCALE
        answer = tl.sum(held * q[:, None], 0) + tl.sum(q * k, 0) * missing
    return held + k[:, None] * missing[None, :], answer


@triton.jit
def write_inputs(
    qkv, stride, decays, betas, first, recent, base, start, tokens, head, column, inside, beta_too, RING: tl.constexpr,
    HEADS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Inputs of a request's latest tokens, of columns of one head, into its ring."""
    N: tl.constexpr = HEADS * DIM
    ROW: tl.constexpr = 4 * N + HEADS
    channel = head * DIM + column
    for at in range(tl.maximum(tokens - RING, 0), tokens):
        line, slot = first + at, recent + (start + at) % RING * ROW
        for part in tl.static_range(3):
            x = tl.load(qkv + line * stride + part * N + channel, mask=inside, other=0.0)
            tl.store(slot + part * N + channel, x, mask=inside)
        tl.store(slot + 3 * N + channel, tl.load(decays + line * N + channel, mask=inside, other=0.0), mask=inside)
        tl.store(slot + 4 * N + head, tl.load(betas + line * HEADS + head), mask=beta_too)


@triton.jit
def normalize_head(out, outputs, gain, eps, at, column, inside, DIM: tl.constexpr):
    """A head's result at `at`, behind its norm and output gate."""
    x = tl.load(out + at + column, mask=inside, other=0.0, cache_modifier=".cg")  # other programs wrote it
    gate = tl.load(outputs + at + column, mask=inside, other=0.0)
    factor = tl.rsqrt(tl.sum(x * x, 0) / DIM + eps)
    x = x * factor * tl.load(gain + column, mask=inside, other=0.0) * tl.sigmoid(gate)
    tl.store(out + at + column, x, mask=inside)


@triton.jit
def _run_tokens(
    qkv, decays, betas, outputs, filters, gain, eps, places, positions, query_start, matrix, base, recent, out,
    counters, stride, SCALE: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    WIDTH: tl.constexpr, RING: tl.constexpr, SPLITS: tl.constexpr, ALL: tl.constexpr, UNIT: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Without ALL, requests of more tokens than are taken back are left to chunks.py, but for what is pending, and
    results are not normalised yet."""
    begin(PDL)
    stride *= UNIT
    N: tl.constexpr = HEADS * DIM
    MOST: tl.constexpr = RING - WIDTH + 1  # tokens that may be taken back
    program = tl.program_id(0)
    split, head, request = program % SPLITS, program // SPLITS % HEADS, program // SPLITS // HEADS
    first = tl.load(query_start + request)
    tokens = (tl.load(query_start + request + 1) - first).to(tl.int32)
    place = tl.load(places + request)
    key, value = tl.arange(0, BK), split * BV + tl.arange(0, BV)
    if (tokens > 0) & (place == 0):  # nobody's
        wait(PDL)
        for at in range(tokens):
            line = out + (first + at) * N + head * DIM + value
            tl.store(line, tl.zeros([BV], tl.float32), mask=value < DIM)
    if (tokens > 0) & (place > 0):
        start = tl.load(positions + first).to(tl.int32)
        base += place * HEADS + head
        pending = start - tl.load(base).to(tl.int32)
        is_kept = tokens > MOST
        is_left = is_kept & (not ALL)
        recent += place * RING * (4 * N + HEADS)
        rows, token_decays, token_betas = qkv + first * stride, decays + first * N, betas + first * HEADS
        cells = matrix + (place * HEADS + head) * DIM * DIM + key[:, None] * DIM + value[None, :]
        inside = (key < DIM)[:, None] & (value < DIM)[None, :]
        if not ALL:  # a long request with nothing pending is not read
            inside = inside & (key * 0 + tl.where(is_kept, pending, 1) > 0)[:, None]
        held = tl.load(cells, mask=inside, other=0.0)
        for i in range(pending):  # whose inputs are in the ring
            held, _ = _take_token(held, i - pending, rows, stride, token_decays, token_betas, recent, start, filters,
                                  head, key, value, False, SCALE, HEADS, DIM, WIDTH, RING)  # fmt: skip
        wait(PDL)
        if (pending > 0) & (is_left | (not is_kept)):
            tl.store(cells, held, mask=inside)
        if not is_left:
            for at in range(tokens):
                held, answer = _take_token(held, at, rows, stride, token_decays, token_betas, recent, start, filters,
                                           head, key, value, True, SCALE, HEADS, DIM, WIDTH, RING)  # fmt: skip
                tl.store(out + (first + at) * N + head * DIM + value, answer, mask=value < DIM)
            if is_kept:
                tl.store(cells, held, mask=inside)
            tl.debug_barrier()  # all that this program reads of the ring is read, all of its results are written
            is_last = True
            if SPLITS > 1:
                is_last = tl.atomic_add(counters + request * HEADS + head, 1, sem="acq_rel") == SPLITS - 1
            if is_last:
                if ALL:
                    for at in range(tokens):
                        normalize_head(out, outputs, gain, eps, (first + at) * N + head * DIM, key, key < DIM, DIM)
                write_inputs(qkv, stride, decays, betas, first, recent, base, start, tokens, head, key, key < DIM,
                             True, RING, HEADS, DIM)  # fmt: skip
                tl.store(base, (start + tl.where(is_kept, tokens, 0)).to(tl.float32))
    wait(PDL)  # of all programs: the next kernel waits for this one alone


def find_unit(x: Tensor) -> int:
    """What divides the stride of its rows, up to 16; 1 if it does not begin at a multiple of 16 bytes. A kernel that
    knows it reads 16 bytes at once."""
    return 1 if x.data_ptr() % 16 else math.gcd(x.stride(0), 16)


def choose_tokens_config(requests: int, delta: DeltaWeights) -> TokensConfig:
    """The widest of which there are enough programs to fill a GPU."""
    columns = requests * delta.heads * delta.dim
    return next((how for how in (COLUMNS_64, COLUMNS_32) if columns >= how.columns * LEAST_PROGRAMS), COLUMNS_16)


def count_counters(requests: int, delta: DeltaWeights, config: TokensConfig | None = None) -> int:
    """That `run_tokens` needs: one for each head of each request, where programs share heads."""
    how = config or choose_tokens_config(requests, delta)
    return requests * delta.heads if how.columns < delta.dim else 0


def run_tokens(
    qkv: Tensor, gates: Gates, delta: DeltaWeights, norm: Norm, state: DeltaState, where: Where,
    normalizes: bool = True, config: TokensConfig | None = None,
) -> None:  # fmt: skip
    """Writes `gates.out` and the states. qkv: f32 [T, 3 * heads * dim], rows may be strided. `gates.counters`: one for
    each head of each request.

    normalizes: every request is run, and its result normalised. Otherwise long ones are left to chunks.py.
    """
    requests = len(where.places)
    how = config or choose_tokens_config(requests, delta)
    splits = triton.cdiv(delta.dim, how.columns)
    assert len(gates.counters) >= requests * delta.heads or splits == 1, "a counter for each head"
    pdl, unit = uses_pdl(qkv), find_unit(qkv)
    _run_tokens[requests * delta.heads * splits,](
        qkv, gates.decays, gates.betas, gates.outputs, delta.conv, norm.weight, norm.eps, *where, state.matrix,
        state.base, state.recent, gates.out, gates.counters, qkv.stride(0) // unit, SCALE=delta.dim**-0.5,
        HEADS=delta.heads, DIM=delta.dim, BK=max(16, triton.next_power_of_2(delta.dim)), BV=how.columns,
        WIDTH=delta.conv.shape[1], RING=state.recent.shape[1], SPLITS=splits, ALL=normalizes, UNIT=unit, PDL=pdl,
        num_warps=how.warps, launch_pdl=pdl,
    )  # fmt: skip


def fits_kernels(delta: DeltaWeights) -> bool:
    """Whether the kernels serve such heads: a program holds all keys of its columns."""
    return delta.dim <= 128 and delta.conv.dtype == torch.float32
