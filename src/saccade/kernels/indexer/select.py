"""The best k of a token's logits without a sort, and beside it the absorption of the queries.

One program holds 8,192 logits in registers, as integers of the same order, and closes in on the k-th largest: two
thresholds a round, until one parts exactly k from the rest or only equal logits are left between them. A running count
then gives each chosen logit its place. Longer contexts go in chunks of 8,192, and the best of the chunks are put to the
same test. The queries of the attention do not wait for the selection: other programs of the last launch absorb them.

Reference: `select` in reference.py; for `absorb`, `linear` and `rotate`. Serves any number of tokens, absorption up to
64. Measured: 8.2 us for one token, 9.7 us for 8. Next: select_hopper.py, for prompts on a Hopper;
attention/sparse_decode.py.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.kernels.indexer.select_hopper import are_selected_by_hand, select_by_hand
from saccade.kernels.indexer.thresholds import WRONG, count_candidates, narrow, to_number, to_order
from saccade.kernels.launch import ONCE, begin, uses_pdl, wait
from saccade.kernels.types import CAPTURED_TOKENS, Rotation, Selection


class SelectConfig(NamedTuple):
    """How the work is divided."""

    block: int = 8192  # logits that a program holds: 16 a thread. Twice as many take 27 us instead of 9
    columns: int = 64  # of w_uk in a program: 128 programs at 16 heads. Of more than 128 rows fewer: registers spill
    warps: int = 16


# With half of the warps 9.5 us, not 8.2. For 8 tokens it is the other way round: 10.4, not 9.7.
SELECT_ONE, SELECT_SEVERAL = SelectConfig(), SelectConfig(warps=8)


def select(logits: Tensor, positions: Tensor, k: int, config: SelectConfig | None = None, pool: int = 1) -> Selection:
    """i32 [T, min(k, S)]: positions of the k best logits up to the token's own, ascending, -1 padded; nothing but -1
    where one of these is NaN or infinite.

    logits: f32 [T, S]; of equal ones the lowest positions win. What follows a token's position makes no difference.
    Rows are apart by a multiple of 16, and k is at most half of the logits of a program, where S exceeds these.

    pool: tokens that share a logit. Then S and k count pools, and the selection has their tokens and those of the pool
    that a token's position leaves incomplete: i32 [T, min(k, S) * pool + pool - 1], as `expand_pools` of pools.py.
    """
    if config is None and pool == 1 and len(logits) > CAPTURED_TOKENS and are_selected_by_hand(logits, k):
        return select_by_hand(logits, positions, min(k, logits.shape[1]))
    return _launch(logits, positions, k, None, None, None, config, pool)[0]


def select_and_absorb(
    logits: Tensor,
    positions: Tensor,
    k: int,
    q: Tensor,
    w_uk: Tensor,
    rotation: Rotation,
    config: SelectConfig | None = None,
    pool: int = 1,
) -> tuple[Selection, Tensor]:
    """`select` and `absorb` in one launch: neither needs the other, and a selection occupies one SM a token."""
    selection, absorbed = _launch(logits, positions, k, q, w_uk, rotation, config, pool)
    assert absorbed is not None
    return selection, absorbed


def absorb(q: Tensor, w_uk: Tensor, rotation: Rotation, config: SelectConfig | None = None) -> Tensor:
    """f32 [T, heads, kv_lora + rope]: queries as they meet the latents, q_nope @ w_uk and the rotated q_rope.

    q: f32 [T, heads, nope + rope], not rotated yet; w_uk: [heads, nope, kv_lora]; pairs are neighbours. Products are
    exact, sums fp32. Meant for few tokens: each 16 have programs of their own.
    """
    how = config or SELECT_SEVERAL
    out, sizes, pdl = _absorbed(q, w_uk), _sizes(w_uk, rotation, how.columns, len(q)), uses_pdl(q)
    _absorb_alone[(_count_programs(sizes, len(q)),)](
        q, w_uk, rotation.cos, rotation.sin, out, q.shape[0], q.stride(0), **sizes, PDL=pdl, num_warps=how.warps,
        launch_pdl=pdl,
    )  # fmt: skip
    return out


def _launch(
    logits: Tensor, positions: Tensor, k: int, q: Tensor | None, w_uk: Tensor | None, rotation: Rotation | None,
    config: SelectConfig | None, pool: int,
) -> tuple[Selection, Tensor | None]:  # fmt: skip
    t, size = logits.shape
    how = config or (SELECT_ONE if t == 1 else SELECT_SEVERAL)
    block = how.block
    assert logits.stride(1) == 1 and logits.dtype == torch.float32 and logits.stride(0) % 16 == 0
    k = min(k, size)
    assert size <= block or 2 * k <= block, f"{k} of {size} logits, in chunks of {block}, do not grow fewer"
    pdl = uses_pdl(logits)
    common = {"num_warps": how.warps, "launch_pdl": pdl}
    best, names, level = logits, None, 0
    while size > block:
        chunks = triton.cdiv(size, block)
        values = logits.new_empty(t, triton.cdiv(chunks * k, 16) * 16)
        places = torch.empty_like(values, dtype=torch.int32)
        _select_chunk[(t, chunks)](
            best, names, positions, values, places, k, size, best.stride(0), values.stride(0), LEVEL=level, POOL=pool,
            BLOCK=block, PDL=pdl, **common,
        )  # fmt: skip
        best, names, size, level = values, places, chunks * k, level + 1
    width = k * pool + pool - 1
    selection = torch.empty(t, width, dtype=torch.int32, device=logits.device)
    absorbed, programs = None, t
    sizes = {"HEADS": 1, "NOPE": 1, "ROPE": 2, "LORA": 1, "COLUMNS": 1, "BLOCKS": 1, "ROWS": 1, "TOKENS": 1}
    if q is not None and w_uk is not None and rotation is not None:
        absorbed, sizes = _absorbed(q, w_uk), _sizes(w_uk, rotation, how.columns, len(q))
        programs += _count_programs(sizes, t)
    cos, sin = rotation or (None, None)
    _select_last[(programs,)](
        best, names, positions, selection, k, size, best.stride(0), q, w_uk, cos, sin, absorbed, t,
        0 if q is None else q.stride(0), LEVEL=level, POOL=pool, LENGTH=block,
        BLOCK=min(triton.next_power_of_2(size), block), WIDTH=triton.next_power_of_2(width), **sizes, PDL=pdl, **common,
    )  # fmt: skip
    return selection, absorbed


def _absorbed(q: Tensor, w_uk: Tensor) -> Tensor:
    heads, nope, lora = w_uk.shape
    assert q.dtype == torch.float32 and q.stride(2) == 1 and q.stride(1) == q.shape[2] and w_uk.is_contiguous()
    return q.new_empty(q.shape[0], heads, lora + q.shape[2] - nope)


def _sizes(w_uk: Tensor, rotation: Rotation, columns: int, tokens: int) -> dict[str, int]:
    heads, nope, lora = w_uk.shape
    rows = triton.next_power_of_2(nope)
    columns = max(16, columns * 128 // max(rows, 128))
    return {
        "HEADS": heads, "NOPE": nope, "ROPE": 2 * rotation.cos.shape[1], "LORA": lora, "COLUMNS": columns,
        "BLOCKS": triton.cdiv(lora, columns), "ROWS": rows,
        "TOKENS": 1 if tokens == 1 else 16,
    }  # fmt: skip


def _count_programs(sizes: dict[str, int], tokens: int) -> int:
    """That absorb. In one program after another, 64 tokens took 11 us longer than 32."""
    return sizes["HEADS"] * sizes["BLOCKS"] * triton.cdiv(tokens, sizes["TOKENS"])


@triton.jit
def find_best(values, n, size, k, BLOCK: tl.constexpr):
    """Of values[:n], of `size` that can be read and BLOCK at most: index, order, and place among the k best, or -1;
    all [BLOCK / 4, 4]. And the greatest order: WRONG, if one of them is NaN or infinite, which are among the best.

    At least k are >= low, fewer than k are >= high. Two thresholds are tried a round. The first two are where the k-th
    of normal numbers would be, 0.12 deviations to either side. Then: where it would be if logits were spread evenly
    between low and high, a little more than half a standard deviation of its rank to either side. Simulated on 8,192
    normal numbers it takes 4.5 rounds, 8 without these bounds. Where a round leaves more than a quarter of the logits
    between, the next tries the middle of the integers instead of a bound, which bounds the rounds. Zero and its
    successor take the latter's turn once: relu makes many exact zeros.

    Fours, because Triton gives them to one thread: it loads them at once, and its sum is what the running count is of.
    A count of single ones keeps the sums of 256 warps' worth of them, which every thread reads.
    """
    four = tl.arange(0, BLOCK // 4)
    index = four[:, None] * 4 + tl.arange(0, 4)[None, :]
    x = tl.load(values + index, mask=(four * 4 < size)[:, None], other=0.0)  # does not wait for n
    # No order is the greatest integer, as a NaN's may be: one more would be the least, and all logits were taken.
    order = tl.where(index < n, tl.where(x < float("inf"), to_order(x), WRONG), -2147483648)
    low = tl.min(tl.min(tl.where(index < n, order, 2147483647), 1), 0)
    greatest = tl.max(tl.max(order, 1), 0)
    high = greatest + 1
    at_low, at_high = n, 0
    if n <= k:
        high = low  # nothing to find: all are above
    x = tl.where(index < n, x, 0.0)
    mean = tl.sum(tl.sum(x, 1), 0) / n
    deviation = tl.sqrt(tl.maximum(tl.sum(tl.sum(x * x, 1), 0) / n - mean * mean, 0.0))
    above_mean = tl.log((n - k).to(tl.float32) / k) / 1.702  # deviations: the logistic curve is nearly the normal one
    a = to_order(mean + deviation * (above_mean - 0.12))
    b = to_order(mean + deviation * (above_mean + 0.12))
    while (low + 1 < high) & (at_low != k):
        a = tl.minimum(tl.maximum(a, low + 1), high - 1)
        b = tl.minimum(tl.maximum(b, low + 1), high - 1)
        packed = tl.sum(tl.sum((order >= a).to(tl.int32) + ((order >= b).to(tl.int32) << 16), 1), 0)
        before = at_low - at_high
        low, at_low, high, at_high = narrow(low, at_low, high, at_high, a, packed & 0xFFFF, k)
        low, at_low, high, at_high = narrow(low, at_low, high, at_high, b, packed >> 16, k)
        between = at_low - at_high
        part = 1.0 / between.to(tl.float32)
        share = (at_low - k).to(tl.float32) * part
        bound = 0.6 * tl.sqrt((share * (1.0 - share) + part) * part)
        is_poor = between * 4 > before
        first = to_number(low)
        width = to_number(high) - first
        a = to_order(first + width * (share - tl.where(is_poor, 0.0, bound)))
        b = tl.where(is_poor, (low & high) + ((low ^ high) >> 1), to_order(first + width * (share + bound)))
        b = tl.where(low == 0, 1, b)
    above, reaches = order >= high, order >= low
    counted = above.to(tl.int32) + ((reaches & ~above).to(tl.int32) << 16)
    of_four = tl.sum(counted, 1)
    counts = (tl.cumsum(of_four, 0) - of_four)[:, None] + tl.cumsum(counted, 1)
    n_above, n_tied, spare = counts & 0xFFFF, counts >> 16, k - at_high
    taken = above | (reaches & (n_tied <= spare))
    return index, order, tl.where(taken, n_above + tl.minimum(n_tied, spare) - 1, -1), greatest


@triton.jit
def _select_chunk(
    values, names, positions, best, places, k, size, stride, to_stride, LEVEL: tl.constexpr, POOL: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The best k of one chunk, with their positions, to where that chunk's belong."""
    begin(PDL)
    wait(PDL)
    token, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    n = count_candidates(tl.load(positions + token).to(tl.int32), k, LEVEL, POOL, BLOCK) - chunk * BLOCK
    if n > 0:
        n = tl.minimum(n, BLOCK)
        start = token * stride + chunk * BLOCK
        index, order, place, _ = find_best(values + start, n, size - chunk * BLOCK, k, BLOCK)
        x = to_number(order)
        name = chunk * BLOCK + index if LEVEL == 0 else tl.load(names + start + index, mask=place >= 0, other=0)
        to = token * to_stride + chunk * k + place
        tl.store(best + to, x, mask=place >= 0)
        tl.store(places + to, name, mask=place >= 0)


@triton.jit(do_not_specialize=["n_tokens"])
def _select_last(
    values, names, positions, selection, k, size, stride, q, w_uk, cos, sin, absorbed, n_tokens, q_stride,
    LEVEL: tl.constexpr, POOL: tl.constexpr, LENGTH: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
    HEADS: tl.constexpr, NOPE: tl.constexpr, ROPE: tl.constexpr, LORA: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCKS: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    begin(PDL)
    program = tl.program_id(0)
    if program < n_tokens:
        wait(PDL)
        token = program.to(tl.int64)
        position = tl.load(positions + token).to(tl.int32)
        n = count_candidates(position, k, LEVEL, POOL, LENGTH)
        candidates = n if POOL == 1 else tl.maximum(n, 1)  # of no complete pool one is taken, and left out below
        index, _, place, greatest = find_best(values + token * stride, candidates, size, k, BLOCK)
        name = index
        if LEVEL > 0:
            name = tl.load(names + token * stride + index, mask=place >= 0, other=0)
        name = tl.where(greatest == WRONG, -1, name)
        column = tl.arange(0, WIDTH)
        if POOL == 1:
            tl.store(selection + token * k + place, name, mask=place >= 0)
            tl.store(selection + token * k + column, tl.full([WIDTH], -1, tl.int32), mask=(column >= n) & (column < k))
        else:
            row, taken = selection + token * (k * POOL + POOL - 1), tl.minimum(n, k) * POOL
            for i in tl.static_range(POOL):  # none where no pool is complete: the tail would be written twice
                its = tl.where(name >= 0, name * POOL + i, -1)
                tl.store(row + place * POOL + i, its, mask=(place >= 0) & (place < n))
            # Behind them the tokens of the incomplete pool, unless nobody knows which pools are best.
            last = tl.where((greatest == WRONG) & (n > 0), -1, position)
            latest = position + 1 - (position + 1) % POOL + column - taken
            behind = (column >= taken) & (column < k * POOL + POOL - 1)
            tl.store(row + column, tl.where(latest <= last, latest, -1), mask=behind)
    elif HEADS * LORA > 1:
        absorb_block(
            program - n_tokens, q, w_uk, cos, sin, absorbed, n_tokens, q_stride, HEADS, NOPE, ROPE, LORA, COLUMNS,
            BLOCKS, ROWS, TOKENS, PDL,
        )  # fmt: skip


@triton.jit(do_not_specialize=["n_tokens"])
def _absorb_alone(
    q, w_uk, cos, sin, absorbed, n_tokens, q_stride, HEADS: tl.constexpr, NOPE: tl.constexpr, ROPE: tl.constexpr,
    LORA: tl.constexpr, COLUMNS: tl.constexpr, BLOCKS: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    begin(PDL)
    absorb_block(
        tl.program_id(0), q, w_uk, cos, sin, absorbed, n_tokens, q_stride, HEADS, NOPE, ROPE, LORA, COLUMNS, BLOCKS,
        ROWS, TOKENS, PDL,
    )  # fmt: skip


@triton.jit
def absorb_block(
    program, q, w_uk, cos, sin, absorbed, n_tokens, q_stride, HEADS: tl.constexpr, NOPE: tl.constexpr,
    ROPE: tl.constexpr, LORA: tl.constexpr, COLUMNS: tl.constexpr, BLOCKS: tl.constexpr, ROWS: tl.constexpr,
    TOKENS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """COLUMNS of one head's absorbed query, for TOKENS tokens; the head's first programs also turn its rope part."""
    head, block = program % (HEADS * BLOCKS) // BLOCKS, program % BLOCKS
    row, column = tl.arange(0, ROWS), block * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < NOPE)[:, None] & (column < LORA)[None, :]
    w = tl.load(
        w_uk + (head * NOPE + row[:, None]) * LORA + column[None, :], mask=inside, other=0.0, eviction_policy=ONCE
    )
    wait(PDL)
    WIDTH: tl.constexpr = LORA + ROPE
    source, to = q + head * (NOPE + ROPE), absorbed + head * WIDTH
    first = program // (HEADS * BLOCKS) * TOKENS
    token = first + tl.arange(0, TOKENS)
    there = token < n_tokens
    if TOKENS == 1:
        x = tl.load(source + first * q_stride + row, mask=row < NOPE, other=0.0)
        y = tl.sum(w.to(tl.float32) * x[:, None], 0)[None, :]
    else:
        asked = there[:, None] & (row < NOPE)[None, :]
        x = tl.load(source + token[:, None] * q_stride + row[None, :], mask=asked, other=0.0)
        if w.dtype == tl.bfloat16:  # three BF16 numbers hold all bits of an f32
            high = x.to(tl.bfloat16)
            x -= high.to(tl.float32)
            middle = x.to(tl.bfloat16)
            low = (x - middle.to(tl.float32)).to(tl.bfloat16)
            y = tl.dot(high, w, tl.dot(middle, w, tl.dot(low, w)))
        else:
            y = tl.dot(x, w.to(tl.float32), input_precision="ieee")
    place = to + token[:, None] * (HEADS * WIDTH)
    tl.store(place + column[None, :], y, mask=there[:, None] & (column < LORA)[None, :])
    if ROPE > 0:  # noqa: SIM102, known to the compiler
        if block == 0:
            pair = tl.arange(0, ROPE // 2)
            angle = token[:, None] * (ROPE // 2) + pair[None, :]
            c = tl.load(cos + angle, mask=there[:, None], other=0.0)
            s = tl.load(sin + angle, mask=there[:, None], other=0.0)
            turning = source + token[:, None] * q_stride + NOPE + 2 * pair[None, :]
            a = tl.load(turning, mask=there[:, None], other=0.0)
            b = tl.load(turning + 1, mask=there[:, None], other=0.0)
            tl.store(place + LORA + 2 * pair[None, :], a * c - b * s, mask=there[:, None])
            tl.store(place + LORA + 2 * pair[None, :] + 1, b * c + a * s, mask=there[:, None])
