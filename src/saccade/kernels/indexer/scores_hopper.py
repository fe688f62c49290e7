"""The kernel of prompt_logits.py for a Hopper, in Gluon: two groups of warps multiply four tokens each, a third copies.

A page of keys is read from L2 once for eight tokens of 64 heads. While one group adds over heads, the other's products
run. On an H200, the last 4,096 of 8,192 tokens: 612 us in BF16 and 410 in FP8; prompt_logits.py takes 707 and 482. Both
stay at three quarters of what the data sheet's rate would allow in BF16; so does cuBLAS.

All is added as in prompt_logits.py: the bits are the same. Reference: `index_logits` in reference.py. Serves 16 to 64
heads of 128. Next: prompt_logits.py.
"""

import triton
import triton.language as tl
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
from saccade.kernels.hopper import (
    COPY_THREADS,
    COPY_WARPS,
    GROUP_WARPS,
    copy_rows,
    find_turn,
    is_hopper,
    load_async,
    make_barriers,
)
from saccade.kernels.indexer.queries import IndexQueries
from saccade.kernels.types import IndexKeys

SCORED_COLUMNS = 128  # tokens times heads of a product; a group has two of them
KEPT_PAGES = 4  # for pages of keys
KEYS_AT_ONCE = 4096  # keys of a program: of 2,048 BF16 took 662 us, and at 32,768 positions 3.47 ms instead of 3.20
SCORE_REGISTERS = (240, 24)  # of a thread of the second group, and of one that copies; the first group has what is left


def are_scored_by_hand(q: IndexQueries) -> bool:
    """Whether the kernel takes these queries."""
    _, heads, dim = q.numbers.shape
    return heads in (16, 32, 64) and dim == 128 and is_hopper(q.numbers)


def score_by_hand(
    q: IndexQueries, keys: IndexKeys, page_table: Tensor, request: Tensor, positions: Tensor, out: Tensor
) -> None:
    """Write `score_prompt`'s result to out f32 [T, S]."""
    (t, heads, dim), context = q.numbers.shape, out.shape[1]
    tokens = 4 * SCORED_COLUMNS // heads
    scales = q.weights if keys.scales is None else keys.scales
    score_rows[triton.cdiv(t, tokens), triton.cdiv(context, KEYS_AT_ONCE)](
        q.numbers, q.weights, keys.data, scales, page_table, request, positions, out, t, context, KEYS_AT_ONCE,
        page_table.stride(0), HEADS=heads, DIM=dim, TOKENS=tokens, PAGE=PAGE, SCALED=keys.scales is not None,
        PLACES=KEPT_PAGES, BYTES=q.numbers.element_size(), COPY_WARPS=COPY_WARPS, COPY_THREADS=COPY_THREADS,
        MULTIPLIES=SCORE_REGISTERS[0], COPIES=SCORE_REGISTERS[1], num_warps=GROUP_WARPS,
    )  # fmt: skip


@gluon.jit
def _find_owners(request, positions, first, n_tokens, TOKENS: gl.constexpr):
    """Requests and positions of the program's tokens."""
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    each = gl.minimum(first + gl.arange(0, TOKENS, layout=ONE), n_tokens - 1)
    return gl.load(request + each), gl.load(positions + each).to(gl.int32)


@gluon.jit
def _find_pass(request, owner, position, i, first, n_tokens, start, chunk, context):
    """Whose keys pass by for the i-th token, and where they end; nobody's if the token before has the same owner."""
    mine = gl.load(request + gl.minimum(first + i, n_tokens - 1))
    before = gl.load(request + gl.minimum(first + gl.maximum(i - 1, 0), n_tokens - 1))
    seen = gl.max(gl.where(owner == mine, position, -1), 0)
    end = gl.minimum(gl.minimum(start + chunk, context), seen + 1)
    return mine, gl.where((i == 0) | (before != mine), end, start)


@gluon.jit
def _copy_keys(
    keys, page_table, request, positions, held, full, free, first, start, chunk, context, n_tokens, table_stride,
    TOKENS: gl.constexpr, DIM: gl.constexpr, PAGE: gl.constexpr, PLACES: gl.constexpr, BYTES: gl.constexpr,
):  # fmt: skip
    owner, position = _find_owners(request, positions, first, n_tokens, TOKENS)
    turn = 0
    for i in range(TOKENS):  # one pass for each request that has tokens here: nearly always one in all
        mine, end = _find_pass(request, owner, position, i, first, n_tokens, start, chunk, context)
        pages = page_table + mine * table_stride
        following = gl.load(pages + start // PAGE)
        for tile in range(start, end, PAGE):
            row = following.to(gl.int64) * PAGE
            following = gl.load(pages + gl.minimum(tile + PAGE, context - PAGE) // PAGE)
            place, phase = find_turn(turn, PLACES)
            mbarrier.wait(free.index(place), phase ^ 1)
            copy_rows(keys + row * DIM, held.index(place), PAGE, DIM, 16 // BYTES)
            async_copy.mbarrier_arrive(full.index(place), increment_count=False)
            turn += 1


@gluon.jit
def _load_tokens(request, positions, mine, token, n_tokens):
    """Up to which position each token sees keys of `mine`."""
    at = gl.minimum(token, n_tokens - 1)
    is_own = (token < n_tokens) & (gl.load(request + at) == mine)
    return gl.where(is_own, gl.load(positions + at).to(gl.int32), -1)


@gluon.jit
def _store(scores, w, seen, to, key, factor, TOKENS: gl.constexpr, HEADS: gl.constexpr, SCALED: gl.constexpr):
    """Scores of a page, added over heads."""
    scores = gl.maximum(scores, 0.0, propagate_nan=tl.PropagateNan.ALL)  # else a NaN would be a score of 0
    logits = gl.sum((scores * gl.expand_dims(w, 0)).reshape((scores.shape[0], TOKENS, HEADS)), 2)
    if SCALED:
        logits = logits * gl.expand_dims(factor, 1)
    gl.store(to + gl.expand_dims(key, 1), logits, mask=gl.expand_dims(key, 1) <= gl.expand_dims(seen, 0))


@gluon.jit
def _score_rows(
    q, weights, key_scales, page_table, request, positions, out, queries, held, full, free, block, start, chunk,
    context, n_tokens, table_stride, TOKENS: gl.constexpr, HEADS: gl.constexpr, DIM: gl.constexpr, PAGE: gl.constexpr,
    PLACES: gl.constexpr, SCALED: gl.constexpr, BYTES: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """What one group of warps does: half of the program's tokens, in two products."""
    EACH: gl.constexpr = TOKENS // 4
    COLUMNS: gl.constexpr = EACH * HEADS
    SCORED: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, COLUMNS, 32 // BYTES])
    VECTOR: gl.constexpr = 16 // BYTES
    owner, position = _find_owners(request, positions, block, n_tokens, TOKENS)
    nothing = gl.zeros([PAGE, COLUMNS], gl.float32, SCORED)
    added = gl.sum(nothing.reshape((PAGE, EACH, HEADS)), 2)
    ADDED: gl.constexpr = added.type.layout
    first, last = block + GROUP * 2 * EACH, n_tokens * HEADS - 1
    LANES: gl.constexpr = DIM // VECTOR
    LOADED: gl.constexpr = gl.BlockedLayout([1, VECTOR], [32 // LANES, LANES], [gl.num_warps(), 1], [1, 0])
    row = gl.arange(0, COLUMNS, layout=gl.SliceLayout(1, LOADED))
    dim = gl.expand_dims(gl.arange(0, DIM, layout=gl.SliceLayout(0, LOADED)), 0)
    for i in gl.static_range(2):
        line = gl.minimum(first * HEADS + i * COLUMNS + row, last).to(gl.int64) * DIM
        load_async(queries.index(2 * GROUP + i), q + gl.expand_dims(line, 1) + dim)
    async_copy.commit_group()
    column = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, SCORED))
    w0 = gl.load(weights + gl.minimum(first * HEADS + column, last))
    w1 = gl.load(weights + gl.minimum(first * HEADS + COLUMNS + column, last))
    token0 = first + gl.arange(0, EACH, layout=gl.SliceLayout(0, ADDED))
    token1 = token0 + EACH
    to0 = out + gl.expand_dims(token0.to(gl.int64) * context, 0)
    to1 = out + gl.expand_dims(token1.to(gl.int64) * context, 0)
    offset = gl.arange(0, PAGE, layout=gl.SliceLayout(1, ADDED))
    async_copy.wait_group(0)
    fence_async_shared()
    turn = 0
    for i in range(TOKENS):
        mine, end = _find_pass(request, owner, position, i, block, n_tokens, start, chunk, context)
        seen0 = _load_tokens(request, positions, mine, token0, n_tokens)
        seen1 = _load_tokens(request, positions, mine, token1, n_tokens)
        pages = page_table + mine * table_stride
        for tile in range(start, end, PAGE):
            place, phase = find_turn(turn, PLACES)
            mbarrier.wait(full.index(place), phase)
            fence_async_shared()
            keys, q0, q1 = held.index(place), queries.index(2 * GROUP), queries.index(2 * GROUP + 1)
            scores0 = warpgroup_mma(keys, q0.permute((1, 0)), nothing, use_acc=False, is_async=True)
            scores1 = warpgroup_mma(keys, q1.permute((1, 0)), nothing, use_acc=False, is_async=True)
            key, factor = tile + offset, gl.zeros([PAGE], gl.float32, gl.SliceLayout(1, ADDED))
            if SCALED:
                factor = gl.load(key_scales + gl.load(pages + tile // PAGE).to(gl.int32) * PAGE + offset)
            scores0 = warpgroup_mma_wait(1, deps=[scores0])
            _store(scores0, w0, seen0, to0, key, factor, EACH, HEADS, SCALED)
            scores1 = warpgroup_mma_wait(0, deps=[scores1])
            mbarrier.arrive(free.index(place))
            _store(scores1, w1, seen1, to1, key, factor, EACH, HEADS, SCALED)
            turn += 1


@gluon.jit(do_not_specialize=["n_tokens", "table_stride"])
def score_rows(
    q, weights, keys, key_scales, page_table, request, positions, out, n_tokens, context, chunk, table_stride,
    HEADS: gl.constexpr, DIM: gl.constexpr, TOKENS: gl.constexpr, PAGE: gl.constexpr, SCALED: gl.constexpr,
    PLACES: gl.constexpr, BYTES: gl.constexpr, COPY_WARPS: gl.constexpr, COPY_THREADS: gl.constexpr,
    MULTIPLIES: gl.constexpr, COPIES: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """A program TOKENS tokens and a chunk of keys. MULTIPLIES, COPIES: registers."""
    first = (gl.num_programs(0) - 1 - gl.program_id(0)) * TOKENS  # the longest contexts first
    start = gl.program_id(1) * chunk
    _, position = _find_owners(request, positions, first, n_tokens, TOKENS)
    if start <= gl.max(position, 0):
        SHARED: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8 * BYTES, rank=2)
        queries = gl.allocate_shared_memory(keys.dtype.element_ty, [4, TOKENS // 4 * HEADS, DIM], SHARED)
        held = gl.allocate_shared_memory(keys.dtype.element_ty, [PLACES, PAGE, DIM], SHARED)
        full, free = make_barriers(PLACES, COPY_THREADS), make_barriers(PLACES, 2)
        gl.warp_specialize(
            [
                (
                    _score_rows,
                    (
                        q, weights, key_scales, page_table, request, positions, out, queries, held, full, free, first,
                        start, chunk, context, n_tokens, table_stride, TOKENS, HEADS, DIM, PAGE, PLACES, SCALED, BYTES,
                        0,
                    ),
                ),
                (
                    _score_rows,
                    (
                        q, weights, key_scales, page_table, request, positions, out, queries, held, full, free, first,
                        start, chunk, context, n_tokens, table_stride, TOKENS, HEADS, DIM, PAGE, PLACES, SCALED, BYTES,
                        1,
                    ),
                ),
                (
                    _copy_keys,
                    (
                        keys, page_table, request, positions, held, full, free, first, start, chunk, context, n_tokens,
                        table_stride, TOKENS, DIM, PAGE, PLACES, BYTES,
                    ),
                ),
            ],
            [num_warps, COPY_WARPS],
            [MULTIPLIES, COPIES],
        )  # fmt: skip
