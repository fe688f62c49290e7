"""The kernel of sparse_prefill.py for Hopper, in Gluon: a tile's rows arrive while the tile before is multiplied.

Triton asks for the next tile at the end of a pass and waits for it at the start of the next one, as two tiles fill the
shared memory. Here copies are asked for two tiles ahead, right behind the product that read their place. All is added
in the same order, but the weights of rows, behind the last tile.

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
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra import cuda

from saccade.kernels.launch import find_arch
from saccade.kernels.types import Latents

HOPPER = 90
load_async = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared  # Triton 3.9; 3.6
MOST_QUERY_HEADS, MOST_QUERY_COLUMNS = 16, 640  # more leave no room for two tiles


def is_taken_by_hand(q: Tensor, latent: Latents, width: int) -> bool:
    """Whether the kernel takes q [T, heads, C] and a pool of C numbers a row, `width` of them values."""
    heads, size, rope = q.shape[1], q.shape[2], q.shape[2] - width
    is_whole = rope > 0 and width % 64 == 0 and rope % 64 == 0  # 128 bytes of a row lie together
    if heads > MOST_QUERY_HEADS or size > MOST_QUERY_COLUMNS or not is_whole:
        return False
    return latent.scales is None and latent.numbers == torch.bfloat16 and find_arch(q) == HOPPER


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
    high = x.to(gl.bfloat16)
    low = (x - high.to(gl.float32)).to(gl.bfloat16)
    both = gl.join(high, low).permute((0, 2, 1)).reshape((2 * M, WIDTH))
    return gl.allocate_shared_memory(gl.bfloat16, [2 * M, WIDTH], SHARED, both)


@gluon.jit
def attend_token(
    q, latent, page_table, request, selection, part, most, weights, scale, k, q_stride, table_stride, selection_stride,
    HEADS: gl.constexpr, M: gl.constexpr, WIDTH: gl.constexpr, ROPE: gl.constexpr, TILE: gl.constexpr,
    SPAN: gl.constexpr, SPLITS: gl.constexpr, PAGE: gl.constexpr, PDL: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """As `_attend_token` of sparse_prefill.py, which is given rows of the pool instead of positions."""
    if PDL:  # in this order: the next kernel may read ahead, see launch.py
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    LOADED: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [num_warps, 1], [1, 0])
    SCORED: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, num_warps // 4], [16, 8 * M // num_warps, 16])
    SEEN: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, 2 * M, 16])
    WIDE: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    NARROW: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=4 * M, element_bitwidth=16, rank=2)
    EACH: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [num_warps, 1], [1, 0])
    HEAD: gl.constexpr = gl.SliceLayout(1, EACH)
    COUNTED: gl.constexpr = gl.BlockedLayout([4], [32], [num_warps], [0])
    ROW: gl.constexpr = gl.SliceLayout(1, LOADED)

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

    head = gl.arange(0, M, layout=HEAD)
    query = q + token * q_stride
    at = gl.expand_dims(head, 1) * (WIDTH + ROPE)
    there = head < HEADS
    column = gl.expand_dims(gl.arange(0, WIDTH, layout=gl.SliceLayout(0, EACH)), 0)
    values = gl.allocate_shared_memory(gl.bfloat16, [2, TILE, WIDTH], WIDE)
    turned = gl.allocate_shared_memory(gl.bfloat16, [2, TILE, ROPE], WIDE)
    tile = gl.arange(0, TILE, layout=ROW)
    for ahead in gl.static_range(2):
        place = first + ahead * TILE + tile
        row = _look_up(chosen, page_table, place, count, own, PAGE)
        if first + ahead * TILE < count:
            _ask(latent, row, values.index(ahead), turned.index(ahead), WIDTH, ROPE, LOADED)
        async_copy.commit_group()  # of nothing, too: groups are counted
    place = first + 2 * TILE + tile
    row = _look_up(chosen, page_table, place, count, own, PAGE)

    x = _share(query + at + column, there, WIDTH, WIDE)
    rope_column = gl.expand_dims(gl.arange(0, ROPE, layout=gl.SliceLayout(0, EACH)), 0)
    y = _share(query + at + (WIDTH + rope_column), there, ROPE, WIDE)
    chances = gl.allocate_shared_memory(gl.bfloat16, [TILE, 2 * M], NARROW)
    total = gl.zeros([WIDTH, 2 * M], gl.float32, SEEN)
    nothing = gl.zeros([TILE, 2 * M], gl.float32, SCORED)
    scored_row = gl.arange(0, TILE, layout=gl.SliceLayout(1, SCORED))
    # As the sums of high and low products lie.
    top = gl.max(gl.sum(nothing.reshape((TILE, M, 2)), 2), 0) + float("-inf")
    weight = gl.zeros_like(gl.sum(nothing.reshape((TILE, M, 2)), 2))
    for start in range(first, count, TILE):
        held = ((start - first) // TILE) % 2
        async_copy.wait_group(1)
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
        high = p.to(gl.bfloat16)
        low = (p - high.to(gl.float32)).to(gl.bfloat16)
        chances.store(gl.join(high, low).reshape((TILE, 2 * M)))
        fence_async_shared()
        fades = gl.convert_layout(gl.join(fade, fade).reshape((2 * M,)), gl.SliceLayout(0, SEEN))
        total = total * gl.expand_dims(fades, 0)
        total = warpgroup_mma(values.index(held).permute((1, 0)), chances, total, is_async=True)
        total = warpgroup_mma_wait(0, deps=[total])
        if start + 2 * TILE < count:
            _ask(latent, row, values.index(held), turned.index(held), WIDTH, ROPE, LOADED)
        async_copy.commit_group()
        place = start + 3 * TILE + tile
        row = _look_up(chosen, page_table, place, count, own, PAGE)
    async_copy.wait_group(0)

    sums = gl.sum(weight, 0)
    both = gl.sum(total.reshape((WIDTH, M, 2)), 2)
    inverse = gl.convert_layout(sums, gl.SliceLayout(0, both.type.layout))
    seen = both / gl.expand_dims(inverse, 0)
    seen = gl.convert_layout(seen.permute((1, 0)), EACH)
    to = (token * SPLITS + gl.program_id(1)) * HEADS + head
    gl.store(part + gl.expand_dims(to, 1) * WIDTH + column, seen, mask=gl.expand_dims(there, 1))
    if SPLITS > 1:
        gl.store(most + to, gl.convert_layout(top, HEAD), mask=there)
        gl.store(weights + to, gl.convert_layout(sums, HEAD), mask=there)
