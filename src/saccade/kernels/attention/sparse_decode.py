"""Attention over the selected tokens, for few tokens: gather, softmax, and the way out of the latent space.

A program gathers the selected rows of one token, tile by tile, and keeps a running softmax. The rows serve as keys and,
without their rope part, as values. At decode many programs share a token's selection; the next kernel adds their
partial results in fixed order and multiplies them with w_uv. Queries and probabilities are split into two BF16 numbers.

Reference: `sparse_attention` in reference.py. Serves any number of tokens; a cache in BF16 or
F32, or FP8 beside them. Measured: the second
kernel takes 3.9 us for one token. Next: sparse_prefill.py, for many tokens.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.kernels import PAGE
from saccade.kernels.attention.latents import inside, load_latents, pass_latents
from saccade.kernels.launch import ONCE, begin, uses_pdl, wait
from saccade.kernels.types import DECODE_TOKENS, Latents, Selection

ATTEND_PROGRAMS = 128  # about so many share a step's selections: one on each multiprocessor
MOST_HEADS = 64  # of a program with tiles of 32 rows: 221 KB of an H200's 232 KB of shared memory
LARGE_TILE, MOST_HEADS_BESIDE = 64, 32  # of rows, and heads of a program then: 221 KB; 64 heads would take 299 KB
MOST_SPLITS = 32  # of a token's selection: 32 partial results of a head are 64 KB
LOG2E = 1.4426950408889634


class AttendConfig(NamedTuple):
    """How the work is divided; `resolve` fills in what is None."""

    splits: int | None = None  # programs that share a token's selection
    tile: int | None = None  # rows that these take at once
    warps: int | None = None
    stages: int = 2
    rows: int = 64  # of w_uv in a program of the second kernel
    # Of its columns: each program reads only its own of the partial results, and who takes the sum adds them.
    slices: int = 1
    combine_warps: int | None = None  # of the second kernel
    # Before the next launch may start: for a family whose later kernels read, before they wait, what came in front of
    # attention. It costs 1.9 us a layer at batch 1.
    waits_first: bool = False

    def resolve(self, tokens: int, k: int, is_exact: bool, heads: int) -> "AttendConfig":
        """For a step of `tokens` tokens that select `k` rows each, of a cache in F32 if `is_exact`."""
        is_few = tokens <= DECODE_TOKENS
        # Four tokens take 16.2 us with 4 warps, not 18.6. Of more heads than 16 they spill 856 bytes a thread and more.
        is_light = tokens <= 4 and self.slices == 1 and heads <= 16 and not is_exact
        most = min(16 if is_exact else 64, max(triton.next_power_of_2(k), 16))
        return self._replace(
            splits=self.splits or min(MOST_SPLITS, max(ATTEND_PROGRAMS // tokens, 1)),
            tile=min(self.tile or (64 if is_few else 32), most),
            warps=self.warps or (8 if is_few and not is_light else 4),  # prefill: two programs an SM
            stages=1 if is_exact else self.stages,
            combine_warps=self.combine_warps or (8 if self.slices == 1 else 4),
        )


ATTEND = AttendConfig()
# For up to two tokens: one takes 3.9 us instead of 4.4; with four slices 2.8, but o_proj, which adds them, 2.7 more.
ATTEND_FEW = AttendConfig(slices=2)


def sparse_attention(
    q: Tensor, latent: Latents, page_table: Tensor, request: Tensor, selection: Selection, scale: float, width: int,
    config: AttendConfig | None = None,
) -> Tensor:  # fmt: skip
    """Absorbed MLA: f32 [T, heads, width] = softmax(q . latent * scale) over the selection @ latent[:, :width].

    q: f32 [T, heads, C]; latent: the pool, C numbers a row, BF16 or F32, or codes beside these; selection:
    i32 [T, K], ascending, -1 at the end.
    Over a selection of nothing it is NaN.
    """
    how = (config or ATTEND).resolve(len(q), selection.shape[1], latent.numbers == torch.float32, q.shape[1])
    part, most, total, _ = _attend(q, latent, page_table, request, selection, scale, width, how)
    return combine_splits(part, most, total)


def combine_splits(part: Tensor, most: Tensor, total: Tensor) -> Tensor:
    """f32 [T, heads, width]: partial results [T, splits, heads, width] in one, in their order; `most` and `total` are
    the greatest scores and the sums of the weights, [T, splits, heads]."""
    t, splits, heads, width = part.shape
    if splits == 1:
        return part[:, 0]
    out, pdl = part.new_empty(t, heads, width), uses_pdl(part)
    _combine[t * heads, 1](
        part, most, total, part, out, HEADS=heads, SPLITS=splits, STEP=min(triton.next_power_of_2(splits), 32),
        WIDTH=width, SLICE=width, COLUMNS=triton.next_power_of_2(width), VALUES=0, ROWS=1, PDL=pdl, num_warps=4,
        launch_pdl=pdl,
    )  # fmt: skip
    return out


def attend_values(
    q: Tensor, latent: Latents, page_table: Tensor, request: Tensor, selection: Selection, scale: float, w_uv: Tensor,
    config: AttendConfig | None = None,
) -> Tensor:  # fmt: skip
    """f32 [slices * T, heads * v]: `sparse_attention` times w_uv [heads, v, width], in fp32, for few tokens, as the sum
    of `slices` of it, which `run_gemv_into` of linear/gemv.py adds.
    """
    heads, v, width = w_uv.shape
    t = q.shape[0]
    how = (config or ATTEND).resolve(t, selection.shape[1], latent.numbers == torch.float32, heads)
    part, most, total, splits = _attend(q, latent, page_table, request, selection, scale, width, how)
    slices = how.slices
    assert width % slices == 0, f"{slices} equal slices of {width} columns"
    out, pdl = q.new_empty(slices * t, heads * v), uses_pdl(q)
    rows, step = min(how.rows, triton.next_power_of_2(v)), min(triton.next_power_of_2(splits), 32)
    _combine[t * heads, triton.cdiv(v, rows), slices](
        part, most, total, w_uv, out, HEADS=heads, SPLITS=splits, STEP=step, WIDTH=width, SLICE=width // slices,
        COLUMNS=triton.next_power_of_2(width // slices), VALUES=v, ROWS=rows, PDL=pdl,
        num_warps=how.combine_warps, launch_pdl=pdl,
    )  # fmt: skip
    return out


def _attend(
    q: Tensor, latent: Latents, page_table: Tensor, request: Tensor, selection: Selection, scale: float, width: int,
    how: AttendConfig,
) -> tuple[Tensor, Tensor, Tensor, int]:  # fmt: skip
    """Partial results [T, splits, heads, width] over the sum of their weights, greatest scores, and those sums."""
    (t, heads, size), k = q.shape, selection.shape[1]
    exact, tile = latent.numbers == torch.float32, how.tile
    assert tile is not None and how.splits is not None, "a config that is not resolved"
    assert q.stride(2) == 1 and q.stride(1) == size and latent.is_contiguous() and selection.stride(1) == 1
    # One tile too many has a split of its own: 2,051 rows, as GLM-5.3-Flash selects, would make others twice as long.
    wanted = how.splits + (how.splits > 1 and triton.cdiv(k, tile) == how.splits + 1)
    length = triton.cdiv(triton.cdiv(k, wanted), tile) * tile  # of a split: whole tiles
    splits = triton.cdiv(k, length)
    part = q.new_empty(t, splits, heads, width)
    most, total, pdl = q.new_empty(t, splits, heads), q.new_empty(t, splits, heads), uses_pdl(q)
    rope = size - width
    most_heads = MOST_HEADS_BESIDE if tile >= LARGE_TILE else MOST_HEADS
    m = min(max(triton.next_power_of_2(heads), 16), most_heads)
    _attend_rows[(splits, t, triton.cdiv(heads, m))](
        q, *pass_latents(latent), page_table, request, selection, part, most, total, scale * LOG2E, k, length,
        q.stride(0), page_table.stride(0), selection.stride(0), HEADS=heads, M=m, WIDTH=width,
        COLUMNS=max(triton.next_power_of_2(width), 16), ROPE=rope, ROPE_COLUMNS=max(triton.next_power_of_2(rope), 16),
        TILE=tile, SPAN=triton.next_power_of_2(length), PAGE=PAGE, EXACT=exact,
        CODED=latent.scales is not None, WAITS_FIRST=how.waits_first, PDL=pdl, num_warps=how.warps,
        # With one stage, codes are decoded as keys and once more as values, which are read byte by byte (Triton 3.9).
        num_stages=1 if length == tile and latent.scales is None else how.stages, launch_pdl=pdl,
    )  # fmt: skip
    return part, most, total, splits


@triton.jit
def _split(x, EXACT: tl.constexpr):
    """x as the sum of two BF16 numbers; x itself where the cache is F32."""
    if EXACT:
        high, low = x, x
    else:
        high = x.to(tl.bfloat16)
        low = (x - high.to(tl.float32)).to(tl.bfloat16)
    return high, low


@triton.jit
def _dot(high, low, b, sum, EXACT: tl.constexpr):
    """sum + (high + low) @ b."""
    sum = tl.dot(high, b, sum, input_precision="tf32x3") if EXACT else tl.dot(low, b, tl.dot(high, b, sum))
    return sum


@triton.jit(do_not_specialize=["table_stride"])
def _attend_rows(
    q, latent, rope, scales, page_table, request, selection, part, most, total, scale, k, length, q_stride,
    table_stride, selection_stride, HEADS: tl.constexpr, M: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
    ROPE: tl.constexpr, ROPE_COLUMNS: tl.constexpr, TILE: tl.constexpr, SPAN: tl.constexpr, PAGE: tl.constexpr,
    EXACT: tl.constexpr, CODED: tl.constexpr, WAITS_FIRST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if WAITS_FIRST:
        wait(PDL)
        begin(PDL)
    else:
        begin(PDL)
        wait(PDL)
    token, split = tl.program_id(1), tl.program_id(0)
    head = tl.arange(0, M)
    if HEADS > M:
        head += tl.program_id(2) * M
    partial = (token * tl.num_programs(0) + split) * HEADS + head
    chosen = selection + token.to(tl.int64) * selection_stride + split * length
    span = tl.arange(0, SPAN)
    held = tl.load(chosen + span, mask=(span < length) & (split * length + span < k), other=-1)
    table = page_table + tl.load(request + token) * table_stride
    if SPAN == TILE:  # one tile: nothing is looked up twice
        slots = tl.load(table + held // PAGE, mask=held >= 0, other=0) * PAGE + held % PAGE
        count = tl.where(tl.load(chosen) < 0, 0, TILE)  # which are there is a mask: a sum would hold up the gather
    else:
        count = tl.sum((held >= 0).to(tl.int32), 0)  # all at the front
    if count == 0:
        tl.store(most + partial, tl.full([M], float("-inf"), tl.float32), mask=head < HEADS)
        tl.store(total + partial, tl.zeros([M], tl.float32), mask=head < HEADS)
        if tl.num_programs(0) == 1:  # a selection of nothing: else `_combine` divides nothing by nothing
            column = tl.arange(0, COLUMNS)
            place = part + partial.to(tl.int64)[:, None] * WIDTH + column[None, :]
            none = tl.full([M, COLUMNS], float("nan"), tl.float32)
            tl.store(place, none, mask=inside(head < HEADS, column, WIDTH, COLUMNS))
        return

    column, rope_column = tl.arange(0, COLUMNS), tl.arange(0, ROPE_COLUMNS)
    query = q + token.to(tl.int64) * q_stride + head[:, None] * (WIDTH + ROPE)
    x = tl.load(query + column[None, :], mask=inside(head < HEADS, column, WIDTH, COLUMNS), other=0.0)
    y = x
    if ROPE > 0:
        y_mask = inside(head < HEADS, rope_column, ROPE, ROPE_COLUMNS)
        y = tl.load(query + WIDTH + rope_column[None, :], mask=y_mask, other=0.0)
    top, weight = tl.full([M], float("-inf"), tl.float32), tl.zeros([M], tl.float32)
    out = tl.zeros([M, COLUMNS], tl.float32)
    for start in range(0, count, TILE):
        if SPAN == TILE:
            there = held >= start  # 0; a tile that depends on the loop is not hoisted, which would cost 250 spills
        else:
            index = start + tl.arange(0, TILE)
            there = index < count
            position = tl.load(chosen + index, mask=there, other=0)
            slots = tl.load(table + position // PAGE, mask=there, other=0) * PAGE + position % PAGE
        rows, turned = load_latents(latent, rope, scales, slots, there, WIDTH, COLUMNS, ROPE, ROPE_COLUMNS, CODED, True)
        if SPAN == TILE:  # nor are the queries, whose arrival would be waited for before the rows are asked for
            x, y = tl.where(start >= 0, x, 0.0), tl.where(start >= 0, y, 0.0)
        out, top, weight = _attend_tile(x, y, rows, turned, there, scale, out, top, weight, ROPE, EXACT)
    place = part + partial.to(tl.int64)[:, None] * WIDTH + column[None, :]
    tl.store(place, out / weight[:, None], mask=inside(head < HEADS, column, WIDTH, COLUMNS))
    tl.store(most + partial, top, mask=head < HEADS)
    tl.store(total + partial, weight, mask=head < HEADS)


@triton.jit
def _attend_tile(
    x, y, rows, rope, visible, scale, out, top, weight, ROPE: tl.constexpr, EXACT: tl.constexpr
):  # fmt: skip
    """One more tile of a running softmax. x, y: the queries' parts; rows, rope, factor: as `load_latents` has them;
    visible: of [rows], or of [queries, rows]."""
    x_high, x_low = _split(x, EXACT)
    first = tl.zeros([x.shape[0], rows.shape[0]], tl.float32)
    second = first
    if ROPE > 0:
        y_high, y_low = _split(y, EXACT)
        if EXACT:
            first = _dot(y_high, y_low, tl.trans(rope), first, EXACT)
        else:
            first, second = tl.dot(y_high, tl.trans(rope), first), tl.dot(y_low, tl.trans(rope), second)
    if EXACT:
        scores = _dot(x_high, x_low, tl.trans(rows), first, EXACT) * scale
    else:  # two sums side by side: a warp has one tile of them, and each product waits for the last
        scores = tl.dot(x_high, tl.trans(rows), first) * scale
        scores += tl.dot(x_low, tl.trans(rows), second) * scale
    if len(visible.shape) == 1:
        scores = tl.where(visible[None, :], scores, float("-inf"))
    else:
        scores = tl.where(visible, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    p = tl.exp2(scores - new_top[:, None])
    fade = tl.exp2(top - new_top)
    weight = weight * fade + tl.sum(p, 1)
    p_high, p_low = _split(p, EXACT)
    return _dot(p_high, p_low, rows, out * fade[:, None], EXACT), new_top, weight


@triton.jit
def _combine(
    part, most, total, w_uv, out, HEADS: tl.constexpr, SPLITS: tl.constexpr, STEP: tl.constexpr, WIDTH: tl.constexpr,
    SLICE: tl.constexpr, COLUMNS: tl.constexpr, VALUES: tl.constexpr, ROWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """SLICE columns of the partial results of a token's head in one, and what they give to ROWS of its values."""
    begin(PDL)
    token, head = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    column, row = tl.arange(0, COLUMNS), tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    part += tl.program_id(2) * SLICE
    if VALUES > 0:
        place = w_uv + tl.program_id(2) * SLICE + (head * VALUES + row)[:, None] * WIDTH + column[None, :]
        w = tl.load(place, mask=inside(row < VALUES, column, SLICE, COLUMNS), other=0.0, eviction_policy=ONCE)
    wait(PDL)
    base = token * (SPLITS * HEADS) + head
    top, weight = tl.full([], float("-inf"), tl.float32), tl.zeros([], tl.float32)
    sum = tl.zeros([COLUMNS], tl.float32)
    for start in tl.static_range(0, SPLITS, STEP):
        split = start + tl.arange(0, STEP)
        there = split < SPLITS
        from_here = base + tl.minimum(split, SPLITS - 1) * HEADS
        rows = part + from_here[:, None] * WIDTH
        x = tl.load(rows + (column if SLICE == COLUMNS else tl.minimum(column, SLICE - 1))[None, :])
        tops = tl.load(most + from_here)
        weights = tl.load(total + from_here)
        tops = tl.where(there, tops, float("-inf"))
        weights = tl.where(there, weights, 0.0)
        x = tl.where((weights > 0)[:, None], x, 0.0)  # an empty split has written none
        new_top = tl.maximum(top, tl.max(tops, 0))  # the first split is never empty
        weights = weights * tl.exp2(tops - new_top)
        fade = tl.exp2(top - new_top)
        sum = sum * fade + tl.sum(x * weights[:, None], 0)
        weight = weight * fade + tl.sum(weights, 0)
        top = new_top
    seen = sum / weight
    if VALUES > 0:
        y = tl.sum(w.to(tl.float32) * seen[None, :], 1)
        out += tl.program_id(2) * tl.num_programs(0) * VALUES
        tl.store(out + (token * HEADS + head) * VALUES + row, y, mask=row < VALUES)
    else:
        tl.store(out + (token * HEADS + head) * WIDTH + column, seen, mask=column < SLICE)
