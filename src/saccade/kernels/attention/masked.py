"""Attention of a prompt over all positions, un-absorbed, with the selection as a bit mask.

Keys and values of each head are made from the latents (expand.py), 192 and 128 numbers a position instead of 576 and
512, and shared by a tile of queries: nothing is gathered. Work grows with the context, where the gathered kernel's
(sparse_prefill.py) does not, so it wins up to some 20,000 positions: in a plain version on an H200, in BF16 and with
the keys and values given, the 8,192 tokens of a prompt with 16 heads took 0.98 ms, 16,384 took 3.45; gathered, 8,192
take 4.8.

"exact" keeps 16 bits of queries, keys, probabilities and values: two BF16 numbers each, and three products in place of
one. Otherwise all are rounded to BF16.

Reference: `sparse_attention` in reference.py, between products with w_uk and w_uv. Serves the shapes of
`can_be_masked`. Next: masked_hopper.py, the same for a Hopper; sparse_prefill.py.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.kernels import PAGE
from saccade.kernels import types as borders
from saccade.kernels.activations import dot, split_in_two
from saccade.kernels.attention.expand import Expanded, count_expanded_bytes, expand_latents
from saccade.kernels.attention.mask import TileMask, write_mask
from saccade.kernels.attention.masked_hopper import QUERY_ROWS, is_masked_by_hand, launch_by_hand
from saccade.kernels.attention.sparse_decode import LOG2E
from saccade.kernels.launch import tiled
from saccade.kernels.types import Latents, Rotation, Selection
from saccade.models.cache_rows import EXPANDED_BYTES


class MaskedConfig(NamedTuple):
    """How the work is divided. A step takes the 64 positions of a page, or half of them."""

    rows: int = 128  # tokens that share keys
    columns: int = PAGE
    warps: int = 8
    stages: int = 3
    by_hand: bool = True  # by masked_hopper.py, where that takes the shapes


ONE_PART, TWO_PARTS = MaskedConfig(), MaskedConfig(columns=32)


def can_be_masked(latent: Latents, w_uk: Tensor, w_uv: Tensor) -> bool:
    """Whether the kernels take these shapes: BF16, and powers of two."""
    widths = (*w_uk.shape[1:], w_uv.shape[1], latent.width - w_uk.shape[2])
    is_bf16 = all(dtype == torch.bfloat16 for dtype in (latent.numbers, w_uk.dtype, w_uv.dtype))
    return is_bf16 and w_uk.stride(2) == w_uv.stride(2) == 1 and all(n >= 16 and n & (n - 1) == 0 for n in widths)


def has_room(rows: int, w_uk: Tensor, w_uv: Tensor) -> bool:
    """Whether keys and values of so many positions, of a head in one BF16 number, fit into what is kept free."""
    return count_expanded_bytes(rows, 1, w_uk.shape[1], w_uv.shape[1], 1) <= EXPANDED_BYTES


def is_masking_faster(tokens: int, requests: int, context: int, heads: int, activations: str) -> bool:
    """Whether it is by count, for prompts: a step of `tokens` tokens of requests of `context` positions at most.
    Gathering takes 8 heads as long as 16."""
    expanded = requests * context * borders.EXPANDED_POSITIONS
    passed = tokens * max(context - tokens / 2, context / 2)
    return expanded + passed < tokens * borders.GATHERED_POSITIONS[activations] * max(16, heads) / heads


def masked_attention(
    q: Tensor, latent: Latents, page_table: Tensor, lengths: Tensor, request: Tensor, positions: Tensor,
    selection: Selection, w_uk: Tensor, w_uv: Tensor, rotation: Rotation, scale: float, activations: str = "exact",
    config: MaskedConfig | None = None, room: int | None = None,
) -> Tensor:  # fmt: skip
    """MLA over the selection: f32 [T, heads, v].

    q: f32 [T, heads, nope + rope], not rotated yet; latent: the pool; page_table: [R, P];
    lengths: [R] tokens in the cache; selection: i32 [T, K], ascending, -1 at the end; w_uk: [heads, nope, kv_lora];
    w_uv: [heads, v, kv_lora]. `room`: bytes of keys and values at a time, one head at least;
    EXPANDED_BYTES if None.
    """
    (t, heads, size), (requests, pages), v = q.shape, page_table.shape, w_uv.shape[1]
    nope = w_uk.shape[1]
    assert q.stride(2) == 1 and q.stride(1) == size and selection.stride(1) == 1 and latent.is_contiguous()
    parts = 2 if activations == "exact" else 1
    how = config or (TWO_PARTS if parts == 2 else ONE_PART)
    mask = write_mask(selection, request, positions, pages, requests, how.rows)
    out = torch.empty(t, heads, v, dtype=torch.float32, device=q.device)
    room = EXPANDED_BYTES if room is None else room
    each = max(1, min(heads, room // count_expanded_bytes(requests * pages * PAGE, 1, nope, v, parts)))
    for first in range(0, heads, each):
        some = slice(first, first + each)
        seen = expand_latents(latent, page_table, lengths, w_uk[some], w_uv[some], parts)
        _launch(q[:, some], seen, mask, request, rotation, scale, out[:, some], parts, how)
    return out


def _launch(
    q: Tensor, seen: Expanded, mask: TileMask, request: Tensor, rotation: Rotation, scale: float, out: Tensor,
    parts: int, how: MaskedConfig,
) -> None:  # fmt: skip
    (t, heads, size), v, rope = q.shape, out.shape[2], seen.rope.shape[1]
    if how.by_hand and how.rows == QUERY_ROWS and is_masked_by_hand(q, size - rope, rope, v):
        launch_by_hand(q, seen, mask, request, rotation, scale * LOG2E, out, parts)
        return
    blocks, rows = len(mask.counts), len(seen.rope)
    keys, turned, values = (tiled(x, how.columns, x.shape[1]) for x in seen)
    _attend_masked[blocks * heads,](
        q, keys, turned, values, mask.words, mask.tiles, mask.counts, request, rotation.cos, rotation.sin, out,
        scale * LOG2E, t, blocks, rows, mask.words.shape[0], mask.tiles.shape[1], mask.words.shape[1], q.stride(0),
        out.stride(0), HEADS=heads, NOPE=size - rope, ROPE=rope, V=v, PARTS=parts, BM=how.rows, BN=how.columns,
        PAGE=PAGE, num_warps=how.warps, num_stages=how.stages,
    )  # fmt: skip


@triton.jit(do_not_specialize=["tokens", "blocks", "pages", "width", "pitch", "rows"])
def _attend_masked(
    q, keys, turned, values, words, tiles, counts, request, cos, sin, out, scale, tokens, blocks, rows, pages, width,
    pitch, q_stride, out_stride, HEADS: tl.constexpr, NOPE: tl.constexpr, ROPE: tl.constexpr, V: tl.constexpr,
    PARTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """A program a tile of queries and a head. keys, values: `rows` rows for each part and head."""
    STEPS: tl.constexpr = PAGE // BN
    block, head = blocks - 1 - tl.program_id(0) // HEADS, tl.program_id(0) % HEADS  # the longest contexts first
    token = block * BM + tl.arange(0, BM)
    there = token < tokens
    owner = tl.load(request + token, mask=there, other=-1).to(tl.int32)
    line = q + token.to(tl.int64)[:, None] * q_stride + head * (NOPE + ROPE)
    nope, nope_low = split_in_two(
        tl.load(line + tl.arange(0, NOPE)[None, :], mask=there[:, None], other=0.0), tl.bfloat16
    )
    pair = tl.arange(0, ROPE // 2)[None, :]
    angle = token[:, None] * (ROPE // 2) + pair
    c = tl.load(cos + angle, mask=there[:, None], other=0.0)
    s = tl.load(sin + angle, mask=there[:, None], other=0.0)
    a = tl.load(line + NOPE + 2 * pair, mask=there[:, None], other=0.0)
    b = tl.load(line + NOPE + 2 * pair + 1, mask=there[:, None], other=0.0)
    rope, rope_low = split_in_two(tl.reshape(tl.join(a * c - b * s, b * c + a * s), [BM, ROPE]), tl.bfloat16)
    # Not -inf: where nothing was seen yet, the difference of two infinities would be no number.
    top, weight = tl.full([BM], -1e30, tl.float32), tl.zeros([BM], tl.float32)
    total = tl.zeros([BM, V], tl.float32)
    column = tl.arange(0, BN).to(tl.int64)
    low = HEADS * rows
    listed = tiles + block.to(tl.int64) * width
    following = tl.load(listed)  # a step ahead: the list has an entry more than a block has tiles
    for i in range(0, tl.load(counts + block) * STEPS):
        tile = following
        following = tl.load(listed + (i + 1) // STEPS)
        word = tl.load(words + (tile % pages).to(tl.int64) * pitch + token)
        word = tl.where(owner == tile // pages, word, 0)
        first = tile * PAGE + i % STEPS * BN
        at = head * rows + first
        k = keys.load([at, 0])
        scores = dot(rope, turned.load([first, 0]).T, dot(nope, k.T, tl.zeros([BM, BN], tl.float32)))
        if PARTS > 1:
            scores = dot(nope_low, k.T, scores)
            scores = dot(rope_low, turned.load([first, 0]).T, scores)
            scores = dot(nope, keys.load([low + at, 0]).T, scores)
        bits = (word[:, None] >> (column + i % STEPS * BN)[None, :]) & 1
        scores = tl.where(bits != 0, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        p = tl.exp2(scores * scale - (new_top * scale)[:, None])
        fade = tl.exp2((top - new_top) * scale)
        top, weight = new_top, weight * fade + tl.sum(p, 1)
        high, rest = split_in_two(p, tl.bfloat16)
        x = values.load([at, 0])
        total = dot(high, x, total * fade[:, None])
        if PARTS > 1:
            total = dot(rest, x, total)
            total = dot(high, values.load([low + at, 0]), total)
    place = out + token.to(tl.int64)[:, None] * out_stride + head * V + tl.arange(0, V)[None, :]
    tl.store(place, total / weight[:, None], mask=there[:, None])
