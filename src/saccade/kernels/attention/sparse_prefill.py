"""Sparse attention of more than 8 tokens over a cache in BF16, or FP8 beside it: one program a token, or several.

The selected rows are the left operand of `wgmma`, 64 at a time: first as keys, then transposed as values. The heads are
its columns, each twice, because queries and probabilities are split into two BF16 numbers. That costs nothing: a
product of 32 columns takes as long as one of 16. Where tokens are fewer than multiprocessors, several programs share a
token's selection, and what they found is added in order, by linear/head_gemm.py or `combine_splits`.

Reference: `sparse_attention` in reference.py. Serves up to 32 heads and latents of powers of two (`is_taken`).
Measured: 1.28 ms for 2,048 tokens of 2,048 rows each. With heads as rows of `mma.sync`, which reads a query again for
each tile, it was 2.52 ms. Next: sparse_hopper.py, the same for Hopper; sparse_decode.py for few tokens; dense.py.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.kernels import PAGE
from saccade.kernels.attention import sparse_hopper
from saccade.kernels.attention.latents import load_latents, pass_latents
from saccade.kernels.attention.sparse_decode import LOG2E, combine_splits
from saccade.kernels.launch import PROCESSORS, uses_pdl
from saccade.kernels.types import Latents, Parts, Selection

LOOKUP_COLUMNS = 1024  # positions that a program looks up
OVERHEAD = 1.5  # tiles that a program takes as long as, beside its own: estimated


class ManyConfig(NamedTuple):
    """How the work is divided."""

    splits: int | None = None  # programs that share a token's selection; None: see `choose_splits`
    tile: int = 64  # rows: the height of a wgmma
    warps: int = 4
    # Tiles in flight. With one, which is not pipelined, the compiled kernel reads outside its shared memory (Triton
    # 3.6).
    stages: int = 2
    by_hand: bool = True  # by sparse_hopper.py, where that takes the shapes


MANY = ManyConfig()


def choose_splits(tokens: int, tiles: int) -> int:
    """Into how many parts the selection of each token is divided, so that the longest multiprocessor has the least to
    do: 4 for 32 tokens, 2 for 64, 1 for 128 and 2 for 192. A part has four tiles at least."""

    def cost(splits: int) -> float:
        return triton.cdiv(tokens * splits, PROCESSORS) * (triton.cdiv(tiles, splits) + OVERHEAD)

    return min(range(1, max(tiles // 4, 1) + 1), key=cost) if tokens < 2 * PROCESSORS else 1


def sparse_attention_of_many(
    q: Tensor, latent: Latents, page_table: Tensor, request: Tensor, selection: Selection, scale: float, width: int,
    config: ManyConfig | None = None,
) -> Tensor:  # fmt: skip
    """f32 [T, heads, width]: `attend_in_parts`, added up."""
    return combine_splits(*attend_in_parts(q, latent, page_table, request, selection, scale, width, config))


def attend_in_parts(
    q: Tensor, latent: Latents, page_table: Tensor, request: Tensor, selection: Selection, scale: float, width: int,
    config: ManyConfig | None = None,
) -> Parts:  # fmt: skip
    """Absorbed MLA: what each program finds of softmax(q . latent * scale) over the selection @ latent[:, :width].

    q: f32 [T, heads, C]; latent: the pool, C numbers a row, BF16, or codes beside it; width and C - width are powers of
    two of 16 at least, or C - width is 0; selection: i32 [T, K], ascending, -1 at the end.
    """
    (t, heads, size), k, config = q.shape, selection.shape[1], config or MANY
    assert q.stride(2) == 1 and q.stride(1) == size and selection.stride(1) == 1 and latent.is_contiguous()
    splits = config.splits or choose_splits(t, triton.cdiv(k, config.tile))
    part = q.new_empty(t, splits, heads, width)
    most, total = (q.new_empty(t, splits, heads) if splits > 1 else part for _ in range(2))
    shape = {
        "HEADS": heads, "M": max(16, triton.next_power_of_2(heads)), "WIDTH": width, "ROPE": size - width,
        "TILE": config.tile, "SPAN": triton.next_power_of_2(k), "SPLITS": splits, "num_warps": config.warps,
    }  # fmt: skip
    found = (part, most, total, scale * LOG2E, k, q.stride(0))
    if config.by_hand and sparse_hopper.is_taken_by_hand(q, latent, width):
        strides, pdl = (page_table.stride(0), selection.stride(0)), uses_pdl(q)
        sparse_hopper.attend_token[t, splits](
            q, latent.data, page_table, request, selection, *found, *strides, **shape, **sparse_hopper.HANDS,
            PAGE=PAGE, PDL=pdl, launch_pdl=pdl,
        )  # fmt: skip
    else:
        rows, coded = _find_rows(selection, page_table, request), latent.scales is not None
        _attend_token[t, splits](q, *pass_latents(latent), rows, *found, **shape, CODED=coded, num_stages=config.stages)
    return Parts(part, most, total)


def is_taken(heads: int, latent: Latents, width: int) -> bool:
    """Whether the kernel takes these shapes."""
    rope = latent.width - width
    sizes = (width, rope) if rope else (width,)
    return latent.numbers == torch.bfloat16 and heads <= 32 and all(n >= 16 and n & (n - 1) == 0 for n in sizes)


def _find_rows(selection: Selection, page_table: Tensor, request: Tensor) -> Tensor:
    """i32 [T, K]: the pool row of each position, once: a gather looks it up in every thread that loads a part of a row.

    -1 stays -1. A pool has fewer than 2^31 rows.
    """
    t, k = selection.shape
    rows = torch.empty(t, k, dtype=torch.int32, device=selection.device)
    columns = min(LOOKUP_COLUMNS, triton.next_power_of_2(k))
    _place[t, triton.cdiv(k, columns)](
        selection, page_table, request, rows, k, selection.stride(0), page_table.stride(0), PAGE=PAGE, COLUMNS=columns,
    )  # fmt: skip
    return rows


@triton.jit
def _place(selection, page_table, request, rows, k, stride, table_stride, PAGE: tl.constexpr, COLUMNS: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    position = tl.load(selection + token * stride + column, mask=column < k, other=-1)
    table = page_table + tl.load(request + token) * table_stride
    page = tl.load(table + position // PAGE, mask=position >= 0, other=0).to(tl.int32)
    tl.store(rows + token * k + column, tl.where(position >= 0, page * PAGE + position % PAGE, -1), mask=column < k)


@triton.jit
def _split(x):
    """x as high and low BF16 numbers, side by side in the last axis: [A, B] -> [A, B, 2]."""
    high = x.to(tl.bfloat16)
    return tl.join(high, (x - high.to(tl.float32)).to(tl.bfloat16))


@triton.jit
def _turn(x, HEADS: tl.constexpr, SIZE: tl.constexpr):
    """Queries f32 [HEADS, SIZE] as a right operand [SIZE, 2 HEADS]."""
    return tl.trans(tl.reshape(tl.permute(_split(x), (0, 2, 1)), [2 * HEADS, SIZE]))


@triton.jit
def _attend_token(
    q, latent, rope, scales, rows, part, most, weights, scale, k, q_stride, HEADS: tl.constexpr, M: tl.constexpr,
    WIDTH: tl.constexpr, ROPE: tl.constexpr, TILE: tl.constexpr, SPAN: tl.constexpr, SPLITS: tl.constexpr,
    CODED: tl.constexpr,
):  # fmt: skip
    """One of SPLITS equal parts of a token's selection, in whole tiles: the sum over the sum of the weights; of several
    SPLITS also the greatest score, and that sum. A part without rows has no weight, and its sum is no number."""
    token = tl.program_id(0).to(tl.int64)
    chosen = rows + token * k
    span = tl.arange(0, SPAN)
    count = tl.sum((tl.load(chosen + span, mask=span < k, other=-1) >= 0).to(tl.int32), 0)
    head, column = tl.arange(0, M), tl.arange(0, WIDTH)
    query = q + token * q_stride + head[:, None] * (WIDTH + ROPE)
    there = (head < HEADS)[:, None]
    x = _turn(tl.load(query + column[None, :], mask=there, other=0.0), M, WIDTH)
    if ROPE > 0:
        rope_column = tl.arange(0, ROPE)
        y = _turn(tl.load(query + WIDTH + rope_column[None, :], mask=there, other=0.0), M, ROPE)
    total = tl.zeros([WIDTH, 2 * M], tl.float32)
    top, weight = tl.full([M], float("-inf"), tl.float32), tl.zeros([M], tl.float32)
    own = tl.load(chosen)  # stands in where there is no row: of somebody else's, a NaN times no weight would be a NaN
    first = 0
    if SPLITS > 1:
        length = tl.cdiv(tl.cdiv(count, SPLITS), TILE) * TILE
        first = tl.program_id(1) * length
        count = tl.minimum(count, first + length)
    for start in range(first, count, TILE):
        place = start + tl.arange(0, TILE)
        row = tl.load(chosen + place, mask=place < count, other=own)
        values, turned = load_latents(
            latent, rope, scales, row, place < count, WIDTH, WIDTH, ROPE, ROPE if ROPE > 0 else 16, CODED, False
        )
        scores = tl.zeros([TILE, 2 * M], tl.float32)
        if ROPE > 0:
            scores = tl.dot(turned, y, scores)
        scores = tl.sum(tl.reshape(tl.dot(values, x, scores), [TILE, M, 2]), 2) * scale
        scores = tl.where((place < count)[:, None], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 0))
        p, fade = tl.exp2(scores - new_top[None, :]), tl.exp2(top - new_top)
        top, weight = new_top, weight * fade + tl.sum(p, 0)
        fades = tl.reshape(tl.join(fade, fade), [2 * M])
        total = tl.dot(tl.trans(values), tl.reshape(_split(p), [TILE, 2 * M]), total * fades[None, :])
    seen = tl.trans(tl.sum(tl.reshape(total, [WIDTH, M, 2]), 2) / weight[None, :])
    to = (token * SPLITS + tl.program_id(1)) * HEADS + head
    tl.store(part + to[:, None] * WIDTH + column[None, :], seen, mask=there)
    if SPLITS > 1:
        tl.store(most + to, top, mask=head < HEADS)
        tl.store(weights + to, weight, mask=head < HEADS)
