"""The kernel of masked.py for a Hopper, in Gluon: two groups of warps multiply 64 queries each, a third copies.

One group looks for maxima and exponentials while the other's products run; within a group the products with values of
the tile before run then. Queries and probabilities stay in registers, so that products read only keys and values from
shared memory. All is added in another order than in masked.py.

On an H200, the last 4,096 of 8,192 tokens, 16 heads, us, keys and values given; by count at the data sheet's rate:

| | Triton | here | by count |
|---|---|---|---|
| "exact" | 2,530 | 1,140 | 780 |
| rounded | 917 | 625 | 260 |

Reference: `sparse_attention` in reference.py; tests on a GPU hold it against masked.py too, which runs everywhere.
Serves nope and v of 64 and 128, rope of 64. Next: masked.py.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from saccade.kernels import PAGE
from saccade.kernels.attention.expand import Expanded
from saccade.kernels.attention.mask import TileMask
from saccade.kernels.hopper import (
    COPY_THREADS,
    COPY_WARPS,
    GROUP_WARPS,
    copy_rows,
    find_turn,
    is_hopper,
    make_barriers,
    split_bf16,
)
from saccade.kernels.types import Rotation

GROUPS, GROUP_ROWS = 2, 64
QUERY_ROWS = GROUPS * GROUP_ROWS  # tokens of a program
KEPT_TILES = {1: 3, 2: 2}  # by parts: tiles of keys and of values that shared memory holds
MASKED_REGISTERS = (
    232,
    40,
)  # of a thread of the second group, and of one that copies; the first group has what is left


def is_masked_by_hand(q: Tensor, nope: int, rope: int, v: int) -> bool:
    """Whether the kernel takes q [T, heads, nope + rope] and values of v numbers."""
    return nope in (64, 128) and rope == 64 and v in (64, 128) and is_hopper(q)


def launch_by_hand(
    q: Tensor, seen: Expanded, mask: TileMask, request: Tensor, rotation: Rotation, scale: float, out: Tensor,
    parts: int,
) -> None:  # fmt: skip
    """out [T, heads, v] = attention of q [T, heads, nope + rope] over what is expanded, `parts` BF16 numbers each, by a
    mask for QUERY_ROWS tokens; `scale` for powers of two."""
    (t, heads, size), v, rope = q.shape, out.shape[2], seen.rope.shape[1]
    blocks, rows = len(mask.counts), len(seen.rope)
    attend_rows[blocks * heads,](
        q, seen.keys, seen.rope, seen.values, mask.words, mask.tiles, mask.counts, request, rotation.cos, rotation.sin,
        out, scale, t, blocks, rows, mask.words.shape[0], mask.tiles.shape[1], mask.words.shape[1], q.stride(0),
        out.stride(0), HEADS=heads, NOPE=size - rope, ROPE=rope, V=v, PARTS=parts, PAGE=PAGE, PLACES=KEPT_TILES[parts],
        ROWS=GROUP_ROWS, GROUPS=GROUPS, COPY_WARPS=COPY_WARPS, COPY_THREADS=COPY_THREADS,
        MULTIPLIES=MASKED_REGISTERS[0], COPIES=MASKED_REGISTERS[1], num_warps=GROUP_WARPS,
    )  # fmt: skip


@gluon.jit
def _copy_tiles(
    keys, turned, values, k, t, x, full_k, free_k, full_v, free_v, listed, count, first_row, low, NOPE: gl.constexpr,
    ROPE: gl.constexpr, V: gl.constexpr, PARTS: gl.constexpr, PLACES: gl.constexpr, PAGE: gl.constexpr,
):  # fmt: skip
    """The listed tiles, keys before values; `first_row` of this head, whose low numbers lie `low` rows behind."""
    following = gl.load(listed)
    for i in range(0, count):
        row = following.to(gl.int64) * PAGE
        following = gl.load(listed + i + 1)  # the list has an entry more than tiles
        held, phase = find_turn(i, PLACES)
        mbarrier.wait(free_k.index(held), phase ^ 1)
        for p in gl.static_range(PARTS):
            copy_rows(keys + (first_row + p * low + row) * NOPE, k.index(held * PARTS + p), PAGE, NOPE, 8)
        copy_rows(turned + row * ROPE, t.index(held), PAGE, ROPE, 8)
        async_copy.mbarrier_arrive(full_k.index(held), increment_count=False)
        mbarrier.wait(free_v.index(held), phase ^ 1)
        for p in gl.static_range(PARTS):
            copy_rows(values + (first_row + p * low + row) * V, x.index(held * PARTS + p), PAGE, V, 8)
        async_copy.mbarrier_arrive(full_v.index(held), increment_count=False)


@gluon.jit
def _score(nope, rope, nope_low, rope_low, k, t, held, PARTS: gl.constexpr, PAGE: gl.constexpr, SCORED: gl.constexpr):
    """Products with a tile of keys, under way: 2 groups of them, 5 of two PARTS."""
    keys, turned = k.index(held * PARTS).permute((1, 0)), t.index(held).permute((1, 0))
    scores = gl.zeros([nope.shape[0], PAGE], gl.float32, SCORED)
    scores = warpgroup_mma(nope, keys, scores, use_acc=False, is_async=True)
    scores = warpgroup_mma(rope, turned, scores, is_async=True)
    if PARTS > 1:
        scores = warpgroup_mma(nope_low, keys, scores, is_async=True)
        scores = warpgroup_mma(rope_low, turned, scores, is_async=True)
        scores = warpgroup_mma(nope, k.index(held * PARTS + 1).permute((1, 0)), scores, is_async=True)
    return scores


@gluon.jit
def _add_values(high, rest, x, held, total, PARTS: gl.constexpr):
    """Products with a tile of values, under way: 1 group of them, 3 of two PARTS."""
    total = warpgroup_mma(high, x.index(held * PARTS), total, is_async=True)
    if PARTS > 1:
        total = warpgroup_mma(rest, x.index(held * PARTS), total, is_async=True)
        total = warpgroup_mma(high, x.index(held * PARTS + 1), total, is_async=True)
    return total


@gluon.jit
def _load_word(words, tile, pages, pitch, token, owner):
    """i64 [tokens]: which positions of a listed tile each token sees."""
    word = gl.load(words + (tile % pages).to(gl.int64) * pitch + token)
    return gl.where(owner == tile // pages, word, 0)


@gluon.jit
def _weigh(scores, word, lane, shift, top, weight, scale, P: gl.constexpr):
    """Probabilities of a tile beside the greatest score so far, as two BF16 numbers; that score, the sum of all weights
    so far, and what earlier ones count for now.

    A lane of a warp has the columns 2 * lane + 8 * j + e of a row: the word is shifted by the lane's part, and the rest
    of the shift is known to the compiler."""
    SCORED: gl.constexpr = scores.type.layout
    SHAPE: gl.constexpr = scores.shape
    bits = (gl.expand_dims(gl.expand_dims(gl.expand_dims(word, 1) >> lane, 1), 3) >> shift) & 1
    seen = gl.where(bits != 0, scores.reshape((SHAPE[0], SHAPE[1] // 8, 4, 2)), float("-inf"))
    seen = gl.convert_layout(seen.reshape((SHAPE[0], SHAPE[1])), SCORED)
    new_top = gl.maximum(top, gl.max(seen, 1))
    p = gl.exp2(seen * scale - gl.expand_dims(new_top * scale, 1))
    fade = gl.exp2((top - new_top) * scale)
    high, rest = split_bf16(p)
    return gl.convert_layout(high, P), gl.convert_layout(rest, P), new_top, weight * fade + gl.sum(p, 1), fade


@gluon.jit
def _load_queries(q, cos, sin, token, tokens, stride, head, NOPE: gl.constexpr, ROPE: gl.constexpr, Q: gl.constexpr):
    """f32: a head's queries as left operands of products, and their rotated dimensions."""
    there = gl.expand_dims(token < tokens, 1)
    line = q + gl.expand_dims(token.to(gl.int64) * stride, 1) + head * (NOPE + ROPE)
    column = gl.expand_dims(gl.arange(0, ROPE, layout=gl.SliceLayout(0, Q)), 0)
    angle = gl.expand_dims(token, 1) * (ROPE // 2) + column // 2
    c, s = gl.load(cos + angle, mask=there, other=0.0), gl.load(sin + angle, mask=there, other=0.0)
    a = gl.load(line + NOPE + column, mask=there, other=0.0)
    b = gl.load(line + NOPE + (column ^ 1), mask=there, other=0.0)  # the other one of the pair
    turned = a * c + gl.where((column & 1) == 0, -b, b) * s
    column = gl.expand_dims(gl.arange(0, NOPE, layout=gl.SliceLayout(0, Q)), 0)
    return gl.load(line + column, mask=there, other=0.0), turned


@gluon.jit
def _attend_rows(
    q, words, listed, request, cos, sin, out, k, t, x, low_nope, low_rope, high_rope, full_k, free_k, full_v, free_v,
    scale, tokens, pages, pitch, q_stride, out_stride, first, count, head, NOPE: gl.constexpr, ROPE: gl.constexpr,
    V: gl.constexpr, PARTS: gl.constexpr, PLACES: gl.constexpr, PAGE: gl.constexpr, ROWS: gl.constexpr,
    GROUP: gl.constexpr,
):  # fmt: skip
    """What one group of warps does: ROWS tokens of a head."""
    SCORED: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, PAGE, 16])
    SEEN: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, V, 16])
    Q: gl.constexpr = gl.DotOperandLayout(0, SCORED, 2)
    P: gl.constexpr = gl.DotOperandLayout(0, SEEN, 2)
    SCORES: gl.constexpr = 1 if PARTS == 1 else 3  # groups of products that may be under way once scores are there
    first += GROUP * ROWS
    token = first + gl.arange(0, ROWS, layout=gl.SliceLayout(1, Q))
    nope, rope = _load_queries(q, cos, sin, token, tokens, q_stride, head, NOPE, ROPE, Q)
    nope, nope_rest = split_bf16(nope)
    rope, rope_rest = split_bf16(rope)
    nope_low, rope_low = nope, rope
    if PARTS > 1:  # registers have no room for these
        nope_low, rope_low, rope_high = low_nope.index(GROUP), low_rope.index(GROUP), high_rope.index(GROUP)
        nope_low.store(nope_rest)
        rope_low.store(rope_rest)
        rope_high.store(rope)
        rope = rope_high
        fence_async_shared()

    top = gl.full([ROWS], -1e30, gl.float32, gl.SliceLayout(1, SCORED))  # not -inf: see masked.py
    weight = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, SCORED))
    four = gl.zeros([ROWS, PAGE], gl.float32, SCORED).reshape((ROWS, PAGE // 8, 4, 2))
    FOUR: gl.constexpr = four.type.layout
    LANE: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(3, FOUR))  # [ROWS, 4]
    mine = first + gl.arange(0, ROWS, layout=gl.SliceLayout(1, LANE))
    owner = gl.load(request + mine, mask=mine < tokens, other=-1).to(gl.int32)
    lane = gl.expand_dims(gl.arange(0, 4, layout=gl.SliceLayout(0, LANE)) * 2, 0).to(gl.int64)
    EIGHT: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, FOUR)))
    PAIR: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, FOUR)))
    eight = gl.expand_dims(gl.expand_dims(gl.expand_dims(gl.arange(0, PAGE // 8, layout=EIGHT) * 8, 0), 2), 3)
    pair = gl.expand_dims(gl.expand_dims(gl.expand_dims(gl.arange(0, 2, layout=PAIR), 0), 1), 2)
    shift = (eight + pair).to(gl.int64)

    word = _load_word(words, gl.load(listed), pages, pitch, mine, owner)
    tile = gl.load(listed + 1)
    mbarrier.wait(full_k.index(0), 0)
    fence_async_shared()
    scores = warpgroup_mma_wait(0, deps=[_score(nope, rope, nope_low, rope_low, k, t, 0, PARTS, PAGE, SCORED)])
    mbarrier.arrive(free_k.index(0))
    high, rest, top, weight, fade = _weigh(scores, word, lane, shift, top, weight, scale, P)
    total = gl.zeros([ROWS, V], gl.float32, SEEN)
    word = _load_word(words, tile, pages, pitch, mine, owner)
    tile = gl.load(listed + gl.minimum(2, count))
    for i in range(1, count):
        held, phase = find_turn(i, PLACES)
        before, phase_before = find_turn(i - 1, PLACES)
        mbarrier.wait(full_k.index(held), phase)
        mbarrier.wait(full_v.index(before), phase_before)
        fence_async_shared()
        scores = _score(nope, rope, nope_low, rope_low, k, t, held, PARTS, PAGE, SCORED)
        adding = _add_values(high, rest, x, before, total, PARTS)
        now = word
        word = _load_word(words, tile, pages, pitch, mine, owner)  # a pass ahead, and its place two: L2 takes long
        tile = gl.load(listed + gl.minimum(i + 2, count))
        scores = warpgroup_mma_wait(SCORES, deps=[scores])
        mbarrier.arrive(free_k.index(held))
        next_high, next_rest, top, weight, fade = _weigh(scores, now, lane, shift, top, weight, scale, P)
        if PARTS > 1:
            total, high, rest = warpgroup_mma_wait(0, deps=[adding, next_high, next_rest])
        else:
            total, high = warpgroup_mma_wait(0, deps=[adding, next_high])
        mbarrier.arrive(free_v.index(before))
        total = total * gl.expand_dims(gl.convert_layout(fade, gl.SliceLayout(1, SEEN)), 1)
    last, phase = find_turn(count - 1, PLACES)
    mbarrier.wait(full_v.index(last), phase)
    fence_async_shared()
    total = warpgroup_mma_wait(0, deps=[_add_values(high, rest, x, last, total, PARTS)])
    seen = total / gl.expand_dims(gl.convert_layout(weight, gl.SliceLayout(1, SEEN)), 1)
    row = first + gl.arange(0, ROWS, layout=gl.SliceLayout(1, SEEN))
    place = out + gl.expand_dims(row.to(gl.int64) * out_stride, 1) + head * V
    column = gl.expand_dims(gl.arange(0, V, layout=gl.SliceLayout(0, SEEN)), 0)
    gl.store(place + column, seen, mask=gl.expand_dims(row < tokens, 1))


@gluon.jit(do_not_specialize=["tokens", "blocks", "pages", "width", "pitch", "rows"])
def attend_rows(
    q, keys, turned, values, words, tiles, counts, request, cos, sin, out, scale, tokens, blocks, rows, pages, width,
    pitch, q_stride, out_stride, HEADS: gl.constexpr, NOPE: gl.constexpr, ROPE: gl.constexpr, V: gl.constexpr,
    PARTS: gl.constexpr, PAGE: gl.constexpr, PLACES: gl.constexpr, ROWS: gl.constexpr, GROUPS: gl.constexpr,
    COPY_WARPS: gl.constexpr, COPY_THREADS: gl.constexpr, MULTIPLIES: gl.constexpr, COPIES: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """A program a tile of queries and a head, as `_attend_masked` of masked.py. MULTIPLIES, COPIES: registers."""
    block, head = blocks - 1 - gl.program_id(0) // HEADS, gl.program_id(0) % HEADS  # the longest contexts first
    listed = tiles + block.to(gl.int64) * width
    count = gl.maximum(gl.load(counts + block), 1)  # who sees nothing looks at a tile in vain
    WIDE: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    k = gl.allocate_shared_memory(gl.bfloat16, [PLACES * PARTS, PAGE, NOPE], WIDE)
    t = gl.allocate_shared_memory(gl.bfloat16, [PLACES, PAGE, ROPE], WIDE)
    x = gl.allocate_shared_memory(gl.bfloat16, [PLACES * PARTS, PAGE, V], WIDE)
    low_nope, low_rope, high_rope = k, t, t
    if PARTS > 1:
        low_nope = gl.allocate_shared_memory(gl.bfloat16, [GROUPS, ROWS, NOPE], WIDE)
        low_rope = gl.allocate_shared_memory(gl.bfloat16, [GROUPS, ROWS, ROPE], WIDE)
        high_rope = gl.allocate_shared_memory(gl.bfloat16, [GROUPS, ROWS, ROPE], WIDE)
    full_k, full_v = make_barriers(PLACES, COPY_THREADS), make_barriers(PLACES, COPY_THREADS)
    free_k, free_v = make_barriers(PLACES, GROUPS), make_barriers(PLACES, GROUPS)
    gl.warp_specialize(
        [
            (
                _attend_rows,
                (
                    q, words, listed, request, cos, sin, out, k, t, x, low_nope, low_rope, high_rope, full_k, free_k,
                    full_v, free_v, scale, tokens, pages, pitch, q_stride, out_stride, block * (GROUPS * ROWS), count,
                    head, NOPE, ROPE, V, PARTS, PLACES, PAGE, ROWS, 0,
                ),
            ),
            (
                _attend_rows,
                (
                    q, words, listed, request, cos, sin, out, k, t, x, low_nope, low_rope, high_rope, full_k, free_k,
                    full_v, free_v, scale, tokens, pages, pitch, q_stride, out_stride, block * (GROUPS * ROWS), count,
                    head, NOPE, ROPE, V, PARTS, PLACES, PAGE, ROWS, 1,
                ),
            ),
            (
                _copy_tiles,
                (
                    keys, turned, values, k, t, x, full_k, free_k, full_v, free_v, listed, count,
                    head.to(gl.int64) * rows, HEADS * rows, NOPE, ROPE, V, PARTS, PLACES, PAGE,
                ),
            ),
        ],
        [num_warps, COPY_WARPS],
        [MULTIPLIES, COPIES],
    )  # fmt: skip
