"""Residual streams (mHC, manifold-constrained hyper-connections): written behind a block, read in front of the next.

Two launches for half a layer. `write_streams` adds what a block gave to its streams, mixes them, and multiplies them
with the mixer's matrix on the way, a piece of columns a program: of up to GEMV_TOKENS tokens one by one in FMAs, of
more sixteen at once on tensor cores, without rounding a number to fewer than 24 bits. `read_streams` adds up the pieces
and takes the block's input, prepared for its norm; a program of its own finds how the streams will be mixed, but for 20
Sinkhorn steps that depend on each other. Those are the next `write_streams`', of each program anew: of few tokens
while the block's last product still runs. `merge_streams` takes the mean of the streams at the end.

Bytes of half a layer of GLM-5.3-Flash: 0.79 MB of the matrix in BF16, and for each token 64 KB of streams written once
and read twice. Reference: `enter` and `add_over_ranks` in models/glm5_next/operations.py. Serves any number of tokens,
streams and columns. Measured in a step of one token on an H200: writing 1.3 to 2 us, reading 2.8; with the Sinkhorn
steps in `read_streams` 2.6 and 5.8. Next: models/glm5_next/gpu.py.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.kernels.activations import dot
from saccade.kernels.launch import begin, uses_pdl, wait
from saccade.kernels.residual import Input, PreparedResidual, find_factor, store_residual
from saccade.kernels.types import GEMV_TOKENS, Norm, StreamMixer

READ_BLOCK = 1024  # columns of a program that reads streams, or takes their mean


class WriteConfig(NamedTuple):
    """How the work is divided; `resolve` fills in what is None."""

    tokens: int | None = None  # of a program: 1, or a multiple of 16
    columns: int | None = None  # of each stream that a program has at once
    chunk: int | None = None  # of each stream in a program
    programs: int = 264  # to aim at: two on each of 132 multiprocessors
    warps: int = 4

    def resolve(self, tokens: int, hidden: int) -> tuple[int, int, int]:
        """Tokens of a program, columns at once, and columns in all."""
        each = self.tokens or (1 if tokens <= GEMV_TOKENS else 16)
        wide = self.columns or (64 if each == 1 else 32)  # sixteen tokens of 64 want more registers than there are
        columns = min(wide, max(16, triton.next_power_of_2(hidden)))
        pieces = -(-hidden // columns)
        if each == 1:  # its part of the matrix is asked for before the streams are there
            return each, columns, columns
        wanted = max(1, self.programs // -(-tokens // each))
        return each, columns, self.chunk or -(-pieces // min(wanted, pieces)) * columns


WRITE = WriteConfig()


class Unwritten(NamedTuple):
    """Streams f32 [T, n, hidden] before a block, what it gave f32 [T, hidden], and how it will be added: f32
    [T, n + n * n], the share of each stream, then of each old stream in each new one, which `_balance` has to balance.

    Of up to GEMV_TOKENS tokens, streams and shares are read before the launch in front has ended: some kernel of each
    block must wait before it lets the next one start (recurrent/gates.py, attention/sparse_decode.py, moe/gate_up.py).
    """

    streams: Tensor
    part: Tensor
    mix: Tensor
    mixer: StreamMixer  # that found the shares


@triton.jit
def _balance_new(comb, eps, N: tl.constexpr):
    """Shares of each old stream, divided by their sum over old ones."""
    total, balanced = comb[0], ()
    for j in tl.static_range(1, N):
        total += comb[j]
    factor = 1.0 / (total + eps)
    for j in tl.static_range(N):
        balanced = balanced + (comb[j] * factor,)
    return balanced


@triton.jit
def _balance(mix, token, there, eps, N: tl.constexpr, N_UP: tl.constexpr, ITERATIONS: tl.constexpr):
    """(share of each stream [tokens, 1], shares of each old stream in all new ones [tokens, N_UP]): Sinkhorn steps make
    both sums of the latter 1."""
    new, post, comb = tl.arange(0, N_UP)[None, :], (), ()
    mix += token.to(tl.int64)[:, None] * (N + N * N)
    asked = there[:, None] & (new < N)
    for i in tl.static_range(N):
        post = post + (tl.load(mix + i, mask=there[:, None], other=0.0),)
        comb = comb + (tl.load(mix + N + i * N + new, mask=asked, other=0.0),)
    comb = _balance_new(comb, eps, N)
    for _ in range(ITERATIONS - 1):
        old = ()
        for j in tl.static_range(N):
            old = old + (comb[j] / (tl.sum(comb[j], 1) + eps)[:, None],)
        comb = _balance_new(old, eps, N)
    return post, comb


@triton.jit
def _pick(shares, i: tl.constexpr, N_UP: tl.constexpr):
    """Column i of shares [tokens, N_UP]."""
    return tl.sum(tl.where(tl.arange(0, N_UP)[None, :] == i, shares, 0.0), 1)[:, None]


@triton.jit
def _load_old(streams, row, column, inside, HIDDEN, N: tl.constexpr):
    """Columns of each of N streams."""
    old = ()
    for j in tl.static_range(N):
        old = old + (tl.load(streams + (row * N + j) * HIDDEN + column[None, :], mask=inside, other=0.0),)
    return old


@triton.jit
def _mix_old(old, comb, N: tl.constexpr, N_UP: tl.constexpr):
    """What the old streams give to each of N new ones."""
    mixed = ()
    for i in tl.static_range(N):
        x = _pick(comb[0], i, N_UP) * old[0]
        for j in tl.static_range(1, N):
            x += _pick(comb[j], i, N_UP) * old[j]
        mixed = mixed + (x,)
    return mixed


@triton.jit
def _add_product(x, w, total):
    """total + x [tokens, columns] @ w [rows, columns].T, with all bits of x."""
    if w.dtype == tl.bfloat16:  # three BF16 numbers hold all bits of an f32
        high = x.to(tl.bfloat16)
        x -= high.to(tl.float32)
        middle = x.to(tl.bfloat16)
        low = (x - middle.to(tl.float32)).to(tl.bfloat16)
        total = dot(high, tl.trans(w), dot(middle, tl.trans(w), dot(low, tl.trans(w), total)))
    else:
        total = tl.dot(x, tl.trans(w), total, input_precision="tf32x3")
    return total


@triton.jit(do_not_specialize=["T"])
def _write(
    streams, part, mix, fn, out, sums, eps, T, HIDDEN, CHUNK: tl.constexpr, N: tl.constexpr, N_UP: tl.constexpr,
    ROWS: tl.constexpr, ROWS_UP: tl.constexpr, ITERATIONS: tl.constexpr, IS_FIRST: tl.constexpr, TOKENS: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """CHUNK columns of TOKENS tokens: out [T, N, HIDDEN], and `sums` [T, chunks, ROWS_UP]: their products with fn
    [ROWS, N * HIDDEN], then the sum of their squares. IS_FIRST: each stream is `streams` [T, HIDDEN]."""
    begin(PDL)
    token, chunk = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.program_id(1)
    there, row, line = token < T, token.to(tl.int64)[:, None], tl.arange(0, ROWS_UP)
    held, mixed = (), ()
    if TOKENS == 1:  # all but `part` is asked for before that is there, and before the shares are balanced
        column = chunk * CHUNK + tl.arange(0, BLOCK)
        inside, asked = there[:, None] & (column < HIDDEN)[None, :], (line < ROWS)[:, None] & (column < HIDDEN)[None, :]
        for i in tl.static_range(N):
            w_at = fn + line[:, None] * (N * HIDDEN) + i * HIDDEN + column[None, :]
            held = held + (tl.load(w_at, mask=asked, other=0.0),)
        if not IS_FIRST:
            before = _load_old(streams, row, column, inside, HIDDEN, N)
            post, comb = _balance(mix, token, there, eps, N, N_UP, ITERATIONS)
            mixed = _mix_old(before, comb, N, N_UP)
        wait(PDL)
    else:
        wait(PDL)
        if not IS_FIRST:
            post, comb = _balance(mix, token, there, eps, N, N_UP, ITERATIONS)
    total, square = tl.zeros([TOKENS, ROWS_UP], tl.float32), tl.zeros([TOKENS, BLOCK], tl.float32)
    products = tl.zeros([ROWS_UP, BLOCK], tl.float32)
    for start in range(0, CHUNK, BLOCK):
        column = chunk * CHUNK + start + tl.arange(0, BLOCK)
        inside = there[:, None] & (column < HIDDEN)[None, :]
        x = tl.load((streams if IS_FIRST else part) + row * HIDDEN + column[None, :], mask=inside, other=0.0)
        y, old = x, mixed
        if TOKENS > 1 and not IS_FIRST:
            old = _mix_old(_load_old(streams, row, column, inside, HIDDEN, N), comb, N, N_UP)
        for i in tl.static_range(N):
            if not IS_FIRST:
                x = post[i] * y + old[i]
            tl.store(out + (row * N + i) * HIDDEN + column[None, :], x, mask=inside)
            square += x * x
            if TOKENS == 1:
                products += held[i].to(tl.float32) * x
            else:
                asked = (line < ROWS)[:, None] & (column < HIDDEN)[None, :]
                w_at = fn + line[:, None] * (N * HIDDEN) + i * HIDDEN + column[None, :]
                total = _add_product(x, tl.load(w_at, mask=asked, other=0.0), total)
    if TOKENS == 1:
        total = tl.sum(products, 1)[None, :]
    total = tl.where((line == ROWS)[None, :], tl.sum(square, 1)[:, None], total)
    tl.store(sums + (row * tl.num_programs(1) + chunk) * ROWS_UP + line[None, :], total, mask=there[:, None])


@triton.jit
def _read(
    streams, sums, base, scale, gain, out, scaled, squares, mix, eps, norm_eps, HIDDEN, CHUNKS, N: tl.constexpr,
    N_UP: tl.constexpr, ROWS: tl.constexpr, ROWS_UP: tl.constexpr, CHUNKS_UP: tl.constexpr, BLOCK: tl.constexpr,
    PREPARED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A token: BLOCK columns of what its block reads; or, the last program, how its streams will be mixed, not
    balanced yet."""
    begin(PDL)
    token, piece, pieces = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1) - 1
    chunk, n = tl.arange(0, CHUNKS_UP), tl.arange(0, N_UP)
    is_chunk, is_stream, is_pair = chunk < CHUNKS, n < N, (n < N)[:, None] & (n < N)[None, :]
    column = piece * BLOCK + tl.arange(0, BLOCK)
    if PREPARED:
        gains = tl.load(gain + column, mask=column < HIDDEN, other=0.0)
    wait(PDL)
    sums += (token * CHUNKS + chunk) * ROWS_UP
    square = tl.load(sums + ROWS, mask=is_chunk, other=0.0)
    factor = find_factor(square, N * HIDDEN, norm_eps)
    if piece < pieces:
        place = streams + (token * N + n)[:, None] * HIDDEN + column[None, :]
        x = tl.load(place, mask=is_stream[:, None] & (column < HIDDEN)[None, :], other=0.0)
        raw = tl.load(sums[:, None] + n[None, :], mask=is_chunk[:, None] & is_stream[None, :], other=0.0)
        raw = tl.sum(raw, 0) * factor * tl.load(scale) + tl.load(base + n, mask=is_stream, other=0.0)
        y = tl.sum(x * (tl.sigmoid(raw) + eps)[:, None], 0)
        at = token * HIDDEN
        if PREPARED:
            store_residual(y, out + at, column, HIDDEN, gains, scaled + at, squares + token * pieces + piece)
        else:
            tl.store(out + at + column, y, mask=column < HIDDEN)
    else:
        raw = tl.load(sums[:, None] + N + n[None, :], mask=is_chunk[:, None] & is_stream[None, :], other=0.0)
        raw = tl.sum(raw, 0) * factor * tl.load(scale + 1) + tl.load(base + N + n, mask=is_stream, other=0.0)
        mix += token * (N + N * N)
        tl.store(mix + n, 2.0 * tl.sigmoid(raw), mask=is_stream)
        pair = n[:, None] * N + n[None, :]  # of an old stream and a new one
        asked = is_chunk[:, None, None] & is_pair[None, :, :]
        given = tl.sum(tl.load(sums[:, None, None] + 2 * N + pair[None, :, :], mask=asked, other=0.0), 0)
        given = given * factor * tl.load(scale + 2) + tl.load(base + 2 * N + pair, mask=is_pair, other=0.0)
        given = tl.where(is_pair, given, float("-inf"))
        top = tl.max(tl.where(is_stream[:, None], given, 0.0), 1)
        share = tl.exp(given - top[:, None])
        share = share / tl.sum(tl.where(is_pair, share, 1.0), 1)[:, None] + eps
        tl.store(mix + N + pair, share, mask=is_pair)


@triton.jit
def _merge(
    streams, part, mix, gain, out, scaled, squares, eps, HIDDEN, N: tl.constexpr, N_UP: tl.constexpr,
    ITERATIONS: tl.constexpr, BLOCK: tl.constexpr, PREPARED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK columns of the mean of a token's new streams."""
    begin(PDL)
    token, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = piece * BLOCK + tl.arange(0, BLOCK)
    inside, at, line = column < HIDDEN, token * HIDDEN, token + tl.arange(0, 1)
    if PREPARED:
        gains = tl.load(gain + column, mask=inside, other=0.0)
    else:
        wait(PDL)
    post, comb = _balance(mix, line, line >= 0, eps, N, N_UP, ITERATIONS)
    if PREPARED:
        wait(PDL)
    share = tl.sum(post[0], 0)
    for i in tl.static_range(1, N):
        share += tl.sum(post[i], 0)
    total = share * tl.load(part + at + column, mask=inside, other=0.0)
    for j in tl.static_range(N):
        old = tl.load(streams + (token * N + j) * HIDDEN + column, mask=inside, other=0.0)
        total += tl.sum(comb[j], 1) * old
    total = total / N
    if PREPARED:
        store_residual(
            total, out + at, column, HIDDEN, gains, scaled + at, squares + token * tl.num_programs(1) + piece
        )
    else:
        tl.store(out + at + column, total, mask=inside)


def write_streams(
    x: Tensor | Unwritten, mixer: StreamMixer, config: WriteConfig | None = None
) -> tuple[Tensor, Tensor]:
    """New streams f32 [T, n, hidden], and what `read_streams` needs of them. x f32 [T, hidden]: each stream is x."""
    old, part, mix, before = x if isinstance(x, Unwritten) else (x, x, x, mixer)
    tokens, hidden, n, rows = len(old), old.shape[-1], mixer.streams, len(mixer.fn)
    assert old.is_contiguous() and part.is_contiguous() and mixer.fn.is_contiguous(), "streams in one piece"
    how, uses = config or WRITE, uses_pdl(old)
    each, columns, chunk = how.resolve(tokens, hidden)
    chunks, rows_up = triton.cdiv(hidden, chunk), max(16, triton.next_power_of_2(rows + 1))
    out, sums = old.new_empty(tokens, n, hidden), old.new_empty(tokens, chunks, rows_up)
    _write[triton.cdiv(tokens, each), chunks](
        old, part, mix, mixer.fn, out, sums, before.eps, tokens, hidden, CHUNK=chunk, N=n,
        N_UP=triton.next_power_of_2(n), ROWS=rows, ROWS_UP=rows_up, ITERATIONS=before.iterations,
        IS_FIRST=not isinstance(x, Unwritten), TOKENS=each, BLOCK=columns, PDL=uses, num_warps=how.warps,
        launch_pdl=uses,
    )  # fmt: skip
    return out, sums


def read_streams(streams: Tensor, sums: Tensor, mixer: StreamMixer, following: Norm) -> tuple[Input, Tensor]:
    """What the block that begins with the norm `following` reads, prepared for that; and how its output will be added,
    as in `Unwritten`."""
    (tokens, n, hidden), (_, chunks, rows_up), rows = streams.shape, sums.shape, len(mixer.fn)
    pieces, uses, is_prepared = triton.cdiv(hidden, READ_BLOCK), uses_pdl(streams), tokens <= GEMV_TOKENS
    out, mix = streams.new_empty(tokens, hidden), streams.new_empty(tokens, n + n * n)
    scaled, squares = (torch.empty_like(out), out.new_empty(tokens, pieces)) if is_prepared else (out, out)
    _read[tokens, pieces + 1](
        streams, sums, mixer.base, mixer.scale, following.weight, out, scaled, squares, mix, mixer.eps, mixer.norm_eps,
        hidden, chunks, N=n, N_UP=triton.next_power_of_2(n), ROWS=rows, ROWS_UP=rows_up,
        CHUNKS_UP=triton.next_power_of_2(chunks),
        BLOCK=min(READ_BLOCK, triton.next_power_of_2(hidden)), PREPARED=is_prepared, PDL=uses, num_warps=4,
        launch_pdl=uses,
    )  # fmt: skip
    return (PreparedResidual(out, scaled, squares) if is_prepared else out), mix


def merge_streams(x: Unwritten, following: Norm) -> Input:
    """f32 [T, hidden], the mean of the new streams, prepared for the norm that follows."""
    (tokens, n, hidden), uses = x.streams.shape, uses_pdl(x.streams)
    pieces, is_prepared = triton.cdiv(hidden, READ_BLOCK), tokens <= GEMV_TOKENS
    out = x.streams.new_empty(tokens, hidden)
    scaled, squares = (torch.empty_like(out), out.new_empty(tokens, pieces)) if is_prepared else (out, out)
    _merge[tokens, pieces](
        x.streams, x.part, x.mix, following.weight, out, scaled, squares, x.mixer.eps, hidden, N=n,
        N_UP=triton.next_power_of_2(n), ITERATIONS=x.mixer.iterations,
        BLOCK=min(READ_BLOCK, triton.next_power_of_2(hidden)), PREPARED=is_prepared, PDL=uses, num_warps=4,
        launch_pdl=uses,
    )  # fmt: skip
    return PreparedResidual(out, scaled, squares) if is_prepared else out
