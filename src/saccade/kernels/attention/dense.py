"""Attention over every position up to a token's own: a selection of all positions, without the list.

Several tokens of a request share the latents that pass by: two tokens of 16 heads. The queries of four would fill the
shared memory. Reference: `sparse_attention` in reference.py with `select_all`. Serves more than 256 tokens whose
selection holds the whole context; all else goes through sparse_decode.py and sparse_prefill.py.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.kernels import PAGE
from saccade.kernels.attention.latents import inside, load_latents, pass_latents
from saccade.kernels.attention.sparse_decode import LOG2E, MOST_HEADS, _attend_tile
from saccade.kernels.types import Latents


class DenseConfig(NamedTuple):
    """How the work is divided."""

    tile: int = 32  # latents that a program takes at once
    rows: int = 32  # heads of all tokens of a program; 64 want more registers than there are
    warps: int = 8
    stages: int = 2


DENSE_BF16 = DenseConfig()
DENSE_EXACT = DenseConfig(tile=16, rows=16, stages=1)  # over a cache in F32


def dense_attention(
    q: Tensor, latent: Latents, page_table: Tensor, request: Tensor, positions: Tensor, scale: float, width: int,
    config: DenseConfig | None = None,
) -> Tensor:  # fmt: skip
    """Absorbed MLA: f32 [T, heads, width] = softmax(q . latent * scale) over positions up to the token's own.

    q: f32 [T, heads, C]; latent: the pool, C numbers a row, BF16 or F32, or codes beside these. A request's
    tokens are consecutive; a program whose tokens are of several requests reads the latents of each.
    """
    t, heads, size = q.shape
    assert q.stride(2) == 1 and q.stride(1) == size and latent.is_contiguous()
    exact, padded, rope = latent.numbers == torch.float32, min(triton.next_power_of_2(heads), MOST_HEADS), size - width
    how = DENSE_EXACT if exact else config or DENSE_BF16
    tokens = max(how.rows // padded, 1)
    out = q.new_empty(t, heads, width)
    _attend_dense[(triton.cdiv(t, tokens), triton.cdiv(heads, padded))](
        q, *pass_latents(latent), page_table, request, positions, out, scale * LOG2E, t, q.stride(0),
        page_table.stride(0), HEADS=heads, PADDED=padded, TOKENS=tokens, WIDTH=width,
        COLUMNS=max(triton.next_power_of_2(width), 16), ROPE=rope, ROPE_COLUMNS=max(triton.next_power_of_2(rope), 16),
        TILE=how.tile, PAGE=PAGE, EXACT=exact, CODED=latent.scales is not None,
        num_warps=how.warps, num_stages=how.stages,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["n_tokens", "table_stride"])
def _attend_dense(
    q, latent, rope, scales, page_table, request, positions, out, scale, n_tokens, q_stride, table_stride,
    HEADS: tl.constexpr, PADDED: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
    ROPE: tl.constexpr, ROPE_COLUMNS: tl.constexpr, TILE: tl.constexpr, PAGE: tl.constexpr, EXACT: tl.constexpr,
    CODED: tl.constexpr,
):  # fmt: skip
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * TOKENS  # the longest contexts first
    line = tl.arange(0, TOKENS * PADDED)
    token, head = first + line // PADDED, line % PADDED
    if HEADS > PADDED:
        head += tl.program_id(1) * PADDED
    there = (token < n_tokens) & (head < HEADS)
    position = tl.load(positions + token, mask=there, other=-1).to(tl.int32)
    owner = tl.load(request + token, mask=there, other=-1)
    column, rope_column = tl.arange(0, COLUMNS), tl.arange(0, ROPE_COLUMNS)
    query = q + token.to(tl.int64)[:, None] * q_stride + head[:, None] * (WIDTH + ROPE)
    x = tl.load(query + column[None, :], mask=inside(there, column, WIDTH, COLUMNS), other=0.0)
    y = x
    if ROPE > 0:
        y_mask = inside(there, rope_column, ROPE, ROPE_COLUMNS)
        y = tl.load(query + WIDTH + rope_column[None, :], mask=y_mask, other=0.0)
    for i in range(TOKENS):  # one pass for each request that has tokens here: nearly always one in all
        mine = tl.load(request + tl.minimum(first + i, n_tokens - 1))
        before = tl.load(request + tl.minimum(first + tl.maximum(i - 1, 0), n_tokens - 1))
        end = tl.max(tl.where(owner == mine, position, -1), 0) + 1
        # Padding names request 0 once more: its tokens are computed and written again, the same.
        end = tl.where((i == 0) | (before != mine), end, 0)
        # Not -inf: rows of another request see nothing in a pass, and the difference of two infinities is no number.
        # Their sums are dropped: a NaN that they do not see, times no weight, is a NaN.
        top = tl.full([TOKENS * PADDED], -1e30, tl.float32)
        weight = tl.zeros([TOKENS * PADDED], tl.float32)
        sums = tl.zeros([TOKENS * PADDED, COLUMNS], tl.float32)
        for start in range(0, end, TILE):
            key = start + tl.arange(0, TILE)
            page = tl.load(page_table + mine * table_stride + start // PAGE)
            slots, there_now = page * PAGE + key % PAGE, key < end
            rows, turned = load_latents(
                latent, rope, scales, slots, there_now, WIDTH, COLUMNS, ROPE, ROPE_COLUMNS, CODED, True
            )
            visible = (key[None, :] <= position[:, None]) & (owner == mine)[:, None]
            sums, top, weight = _attend_tile(x, y, rows, turned, visible, scale, sums, top, weight, ROPE, EXACT)
        seen = there & (owner == mine) & (position < end)
        place = out + (token.to(tl.int64) * HEADS + head)[:, None] * WIDTH + column[None, :]
        tl.store(place, sums / weight[:, None], mask=inside(seen, column, WIDTH, COLUMNS))
