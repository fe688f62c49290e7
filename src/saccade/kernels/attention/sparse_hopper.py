"""The kernel of sparse_prefill.py for Hopper, in Gluon: other warps ask for rows while these multiply.

Triton asks for the next tile at the end of a pass and waits for it at the start of the next one, as two tiles fill the
shared memory. Here four warps copy, each tile as soon as a place is free, and four multiply. All is added in the same
order, but the weights of rows, behind the last tile. On an H200, with the addition of parts, us (in one group of warps,
which asked for a tile behind the product that read its place): 16 tokens 22.5 (26.6), 32 tokens 32 (39), 64 tokens 49
(66), 128 tokens 83 (114), and 4,096 tokens 1,940 (2,310), which is 5.0 TB/s.

Reference: `sparse_attention` in reference.py; tests on a GPU hold it against sparse_prefill.py too, which runs
everywhere. Serves caches in BF16 on devices of capability 9. Next: sparse_prefill.py.
"""

import torch
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
from triton.language.extra import cuda

from saccade.kernels.hopper import (
    COPY_THREADS,
    COPY_WARPS,
    find_turn,
    is_hopper,
    load_async,
    make_barriers,
    split_bf16,
)
from saccade.kernels.types import Latents

MOST_QUERY_HEADS, MOST_QUERY_COLUMNS = 16, 640  # more leave no room for two tiles
COPY_REGISTERS = 48  # of a thread that copies
HANDS = {"COPY_WARPS": COPY_WARPS, "COPY_THREADS": COPY_THREADS, "COPIES": COPY_REGISTERS}


def is_taken_by_hand(q: Tensor, latent: Latents, width: int) -> bool:
    """Whether the kernel takes q [T, heads, C] and a pool of C numbers a row, `width` of them values."""
    heads, size, rope = q.shape[1], q.shape[2], q.shape[2] - width
    is_whole = rope > 0 and width % 64 == 0 and rope % 64 == 0  # 128 bytes of a row lie together
    if heads > MOST_QUERY_HEADS or size > MOST_QUERY_COLUMNS or not is_whole:
        return False
    return latent.scales is None and latent.numbers == torch.bfloat16 and is_hopper(q)


@gluon.jit
def _ask(latent, row, values, turned, WIDTH: gl.constexpr, ROPE: gl.constexpr, LOADED: gl.constexpr):
    """Copies of rows `row` [TILE] of the pool into two buffers, not waited for."""
    at = gl.expand_dims(latent + row.to(gl.int64) * (WIDTH + ROPE), 1)
    column = gl.expand_dims(gl.arange(0, WIDTH, layout=gl.SliceLayout(0, LOADED)), 0)
    load_async(values, at + column)
    rope_column = gl.expand_dims(gl.arange(0, ROPE, layout=gl.SliceLayout(0, LOADED)), 0)
    load_async(turned, at + (WIDTH + rope_column))


@gluon.jit
def _look_up(selection, page_table, place, count, own, PAGE: gl.constexpr):
    """i32: rows of the pool at some places of the selection; `own` position where there is none."""
    position = gl.load(selection + place, mask=place < count, other=own)
    page = gl.load(page_table + position // PAGE).to(gl.int32)
    return page * PAGE + position % PAGE


@gluon.jit
def _share(at, there, WIDTH: gl.constexpr, SHARED: gl.constexpr):
    """Queries f32 [heads, WIDTH] in shared memory: of each a row of high and one of low BF16 numbers."""
    M: gl.constexpr = at.shape[0]
    x = gl.load(at, mask=gl.expand_dims(there, 1), other=0.0)
    high, low = split_bf16(x)
    both = gl.join(high, low).permute((0, 2, 1)).reshape((2 * M, WIDTH))
    return gl.allocate_shared_memory(gl.bfloat16, [2 * M, WIDTH], SHARED, both)


@gluon.jit
def _copy_tiles(
    latent, chosen, page_table, values, turned, full, free, first, count, own, WIDTH: gl.constexpr,
    ROPE: gl.constexpr, TILE: gl.constexpr, PLACES: gl.constexpr, PAGE: gl.constexpr,
):  # fmt: skip
    """Rows of the selection from `first` to `count`, a tile as soon as a place is free."""
    LOADED: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    tile = gl.arange(0, TILE, layout=gl.SliceLayout(1, LOADED))
    row = _look_up(chosen, page_table, first + tile, count, own, PAGE)
    for start in range(first, count, TILE):
        held, phase = find_turn((start - first) // TILE, PLACES)
        mbarrier.wait(free.index(held), phase ^ 1)
        _ask(latent, row, values.index(held), turned.index(held), WIDTH, ROPE, LOADED)
        async_copy.mbarrier_arrive(full.index(held), increment_count=False)
        row = _look_up(chosen, page_table, start + TILE + tile, count, own, PAGE)


@gluon.jit
def _attend_tiles(
    query, at, there, values, turned, full, free, part, most, weights, to, scale, first, count, M: gl.constexpr,
    WIDTH: gl.constexpr, ROPE: gl.constexpr, TILE: gl.constexpr, PLACES: gl.constexpr, SPLITS: gl.constexpr,
):  # fmt: skip
    """What the warps that multiply do. at, there, to: of the heads."""
    WARPS: gl.constexpr = gl.num_warps()
    SCORED: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, WARPS // 4], [16, 8 * M // WARPS, 16])
    SEEN: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, 2 * M, 16])
    WIDE: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    NARROW: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=4 * M, element_bitwidth=16, rank=2)
    EACH: gl.constexpr = at.type.layout
    column = gl.expand_dims(gl.arange(0, WIDTH, layout=gl.SliceLayout(0, EACH)), 0)
    rope_column = gl.expand_dims(gl.arange(0, ROPE, layout=gl.SliceLayout(0, EACH)), 0)
    x = _share(query + at + column, there, WIDTH, WIDE)
    y = _share(query + at + (WIDTH + rope_column), there, ROPE, WIDE)
    chances = gl.allocate_shared_memory(gl.bfloat16, [TILE, 2 * M], NARROW)
    total = gl.zeros([WIDTH, 2 * M], gl.float32, SEEN)
    nothing = gl.zeros([TILE, 2 * M], gl.float32, SCORED)
    scored_row = gl.arange(0, TILE, layout=gl.SliceLayout(1, SCORED))
    # As the sums of high and low products lie.
    top = gl.max(gl.sum(nothing.reshape((TILE, M, 2)), 2), 0) + float("-inf")
    weight = gl.zeros_like(gl.sum(nothing.reshape((TILE, M, 2)), 2))
    for start in range(first, count, TILE):
        held, phase = find_turn((start - first) // TILE, PLACES)
        mbarrier.wait(full.index(held), phase)
        fence_async_shared()
        scores = warpgroup_mma(turned.index(held), y.permute((1, 0)), nothing, is_async=True)
        scores = warpgroup_mma(values.index(held), x.permute((1, 0)), scores, is_async=True)
        scores = warpgroup_mma_wait(0, deps=[scores])
        is_there = gl.expand_dims(start + scored_row < count, 1)
        scores = gl.where(is_there, scores, float("-inf"))
        scores = gl.sum(scores.reshape((TILE, M, 2)), 2) * scale
        new_top = gl.maximum(top, gl.max(scores, 0))
        p = gl.exp2(scores - gl.expand_dims(new_top, 0))
        fade = gl.exp2(top - new_top)
        top, weight = new_top, weight * gl.expand_dims(fade, 0) + p
        high, low = split_bf16(p)
        chances.store(gl.join(high, low).reshape((TILE, 2 * M)))
        fence_async_shared()
        fades = gl.convert_layout(gl.join(fade, fade).reshape((2 * M,)), gl.SliceLayout(0, SEEN))
        total = total * gl.expand_dims(fades, 0)
        total = warpgroup_mma(values.index(held).permute((1, 0)), chances, total, is_async=True)
        total = warpgroup_mma_wait(0, deps=[total])
        mbarrier.arrive(free.index(held))

    sums = gl.sum(weight, 0)
    both = gl.sum(total.reshape((WIDTH, M, 2)), 2)
    inverse = gl.convert_layout(sums, gl.SliceLayout(0, both.type.layout))
    seen = both / gl.expand_dims(inverse, 0)
    seen = gl.convert_layout(seen.permute((1, 0)), EACH)
    gl.store(part + gl.expand_dims(to, 1) * WIDTH + column, seen, mask=gl.expand_dims(there, 1))
    if SPLITS > 1:
        gl.store(most + to, gl.convert_layout(top, gl.SliceLayout(1, EACH)), mask=there)
        gl.store(weights + to, gl.convert_layout(sums, gl.SliceLayout(1, EACH)), mask=there)


@gluon.jit
def attend_token(
    q, latent, page_table, request, selection, part, most, weights, scale, k, q_stride, table_stride, selection_stride,
    HEADS: gl.constexpr, M: gl.constexpr, WIDTH: gl.constexpr, ROPE: gl.constexpr, TILE: gl.constexpr,
    SPAN: gl.constexpr, SPLITS: gl.constexpr, PAGE: gl.constexpr, PDL: gl.constexpr, COPY_WARPS: gl.constexpr,
    COPY_THREADS: gl.constexpr, COPIES: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """As `_attend_token` of sparse_prefill.py, which is given rows of the pool instead of positions. COPIES: registers
    of a thread that copies."""
    if PDL:  # in this order: the next kernel may read ahead, see launch.py
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    PLACES: gl.constexpr = 2  # for tiles
    WIDE: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    COUNTED: gl.constexpr = gl.BlockedLayout([4], [32], [num_warps], [0])
    EACH: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [num_warps, 1], [1, 0])
    token = gl.program_id(0).to(gl.int64)
    chosen = selection + token * selection_stride
    page_table += gl.load(request + token) * table_stride
    span = gl.arange(0, SPAN, layout=COUNTED)
    count = gl.sum((gl.load(chosen + span, mask=span < k, other=-1) >= 0).to(gl.int32), 0)
    own = gl.maximum(gl.load(chosen), 0)
    first = 0
    if SPLITS > 1:
        length = gl.cdiv(gl.cdiv(count, SPLITS), TILE) * TILE
        first = gl.program_id(1) * length
        count = gl.minimum(count, first + length)
    head = gl.arange(0, M, layout=gl.SliceLayout(1, EACH))
    at, there = gl.expand_dims(head, 1) * (WIDTH + ROPE), head < HEADS
    to = (token * SPLITS + gl.program_id(1)) * HEADS + head
    values = gl.allocate_shared_memory(gl.bfloat16, [PLACES, TILE, WIDTH], WIDE)
    turned = gl.allocate_shared_memory(gl.bfloat16, [PLACES, TILE, ROPE], WIDE)
    full, free = make_barriers(PLACES, COPY_THREADS), make_barriers(PLACES, 1)
    gl.warp_specialize(
        [
            (
                _attend_tiles,
                (
                    q + token * q_stride, at, there, values, turned, full, free, part, most, weights, to, scale, first,
                    count, M, WIDTH, ROPE, TILE, PLACES, SPLITS,
                ),
            ),
            (
                _copy_tiles,
                (
                    latent, chosen, page_table, values, turned, full, free, first, count, own, WIDTH, ROPE, TILE,
                    PLACES, PAGE,
                ),
            ),
        ],
        [COPY_WARPS],
        [COPIES],
    )  # fmt: skip
