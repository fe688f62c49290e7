"""The two ends of a decode step: token ids become vectors and angles, logits become the next step's inputs.

`advance` lets steps follow each other on the device: the host may be several of them ahead. Reference: `begin` in
ops/reference.py, greedy rows of engine/sample.py, `Buffers.fill` in engine/buffers.py. Serves any number of tokens;
`advance` serves one token a request.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.kernels import PAGE
from saccade.kernels.launch import begin, uses_pdl, wait
from saccade.kernels.residual import Input, PreparedResidual, store_residual
from saccade.kernels.types import GEMV_TOKENS, Norm, Rotation


@triton.jit
def _begin_step(
    tokens, positions, embedding, turns, x, cos, sin, next_gain, scaled, parts, HIDDEN, FIRST, ROWS,
    HALF: tl.constexpr, BLOCK: tl.constexpr, STREAM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    begin(PDL)
    token, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    wait(PDL)
    column = piece * BLOCK + tl.arange(0, BLOCK)
    place = tl.load(tokens + token) - FIRST
    there = tl.where((place >= 0) & (place < ROWS), HIDDEN, 0)  # columns, of which another rank's token has none here
    row = tl.load(embedding + place * HIDDEN + column, mask=column < there, other=0.0)
    if STREAM:
        gains = tl.load(next_gain + column, mask=column < HIDDEN, other=0.0)
        at = token * HIDDEN
        part = parts + token * tl.num_programs(1) + piece
        store_residual(row.to(tl.float32), x + at, column, HIDDEN, gains, scaled + at, part)
    else:
        tl.store(x + token * HIDDEN + column, row.to(tl.float32), mask=column < HIDDEN)
    if HALF > 0:  # noqa: SIM102, known to the compiler
        if piece == 0:
            pair = tl.arange(0, HALF)
            turns += tl.load(positions + token) * 2 * HALF
            tl.store(cos + token * HALF + pair, tl.load(turns + pair))
            tl.store(sin + token * HALF + pair, tl.load(turns + HALF + pair))


def embed_with_angles(
    tokens: Tensor, positions: Tensor, embedding: Tensor, turns: Tensor, following: Norm, first: int = 0
) -> tuple[Input, Rotation]:
    """f32 [T, hidden] rows of the embedding, and each token's cos and sin out of `turns` f32 [positions, 2, rope / 2].

    The embedding begins with token `first`; tokens before and behind it, which are other ranks', become zeros. The rows
    of up to GEMV_TOKENS tokens are prepared for the norm that follows.

    A table, because the device's own cosine of thousands of radians is wrong in the third digit.
    """
    count, hidden, half = tokens.shape[0], embedding.shape[1], turns.shape[2]
    x = torch.empty(count, hidden, dtype=torch.float32, device=tokens.device)
    rotation = Rotation(*torch.empty(2, count, half, dtype=torch.float32, device=tokens.device))
    pieces, are_few, uses = -(-hidden // 1024), count <= GEMV_TOKENS, uses_pdl(x)
    scaled, squares = (torch.empty_like(x), x.new_empty(count, pieces)) if are_few else (x, x)
    _begin_step[count, pieces](
        tokens, positions, embedding, turns, x, *rotation, following.weight, scaled, squares, hidden, first,
        len(embedding), HALF=half, BLOCK=1024, STREAM=are_few, PDL=uses, num_warps=4, launch_pdl=uses,
    )  # fmt: skip
    return PreparedResidual(x, scaled, squares) if are_few else x, rotation


@triton.jit
def _find_best(logits, best, places, VOCAB, BLOCK: tl.constexpr, PDL: tl.constexpr):
    begin(PDL)
    token, piece = tl.program_id(0), tl.program_id(1)
    column = piece * BLOCK + tl.arange(0, BLOCK)
    wait(PDL)
    row = tl.load(logits + token.to(tl.int64) * VOCAB + column, mask=column < VOCAB, other=float("-inf"))
    value, place = tl.max(row, 0, return_indices=True)
    tl.store(best + token * tl.num_programs(1) + piece, value)
    tl.store(places + token * tl.num_programs(1) + piece, piece * BLOCK + place)


@triton.jit
def _advance(
    best, places, PIECES, chosen, tokens, positions, slots, seq_lens, page_table, PAGES, PIECES_UP: tl.constexpr,
    PAGE_SIZE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    begin(PDL)
    token = tl.program_id(0)
    piece = tl.arange(0, PIECES_UP)
    wait(PDL)
    value = tl.load(best + token * PIECES + piece, mask=piece < PIECES, other=float("-inf"))
    _, winner = tl.max(value, 0, return_indices=True)
    next_token = tl.load(places + token * PIECES + winner).to(tl.int64)
    position = tl.load(positions + token) + 1
    tl.store(chosen + token, next_token)
    tl.store(tokens + token, next_token)
    tl.store(positions + token, position)
    tl.store(seq_lens + token, position + 1)
    page = tl.load(page_table + token * PAGES + position // PAGE_SIZE, mask=position // PAGE_SIZE < PAGES, other=0)
    tl.store(slots + token, page * PAGE_SIZE + position % PAGE_SIZE)


ADVANCE_PIECE = 2048  # logits that a program compares


def advance(
    logits: Tensor, chosen: Tensor, tokens: Tensor, positions: Tensor, slots: Tensor, seq_lens: Tensor, table: Tensor
) -> None:
    """The likeliest token of each row of `logits` [T, vocab] into `chosen` and `tokens`; the step's other inputs go on
    by one position. One token a request; of equal logits the lowest id is chosen."""
    count, vocab = logits.shape
    pieces = -(-vocab // ADVANCE_PIECE)
    best = torch.empty(count, pieces, dtype=torch.float32, device=logits.device)
    places = torch.empty(count, pieces, dtype=torch.int32, device=logits.device)
    uses = uses_pdl(logits)
    _find_best[count, pieces](logits, best, places, vocab, BLOCK=ADVANCE_PIECE, PDL=uses, num_warps=8, launch_pdl=uses)
    _advance[count,](
        best, places, pieces, chosen, tokens, positions, slots, seq_lens, table, table.shape[1],
        PIECES_UP=triton.next_power_of_2(pieces), PAGE_SIZE=PAGE, PDL=uses, num_warps=1, launch_pdl=uses,
    )  # fmt: skip
