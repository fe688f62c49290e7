"""The selection of prompts on a Hopper, in Gluon: a program holds up to 32,768 logits of a token in shared memory.

select.py holds 8,192 in registers; of longer rows it takes the best k of each 8,192 first, which costs more than what
follows. Here each thread keeps its logits in shared memory as others do in registers, and nobody else reads them: a row
is read once, in one go. The search is that of `find_best` in select.py: the same thresholds, but for the order in which
means are added up. On an H200, 4,096 tokens of 8,192, 16,384, 32,768 and 131,072 logits: 135, 283, 770 and 3,530 us;
select.py takes 296, 797, 1,690 and 7,160.

Rows longer than that go in chunks here too. Reference: `select` in reference.py; tests on a GPU hold it against
select.py, which runs everywhere. Next: select.py.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy

from saccade.kernels.hopper import is_hopper, load_async
from saccade.kernels.indexer.thresholds import WRONG, count_candidates, narrow, to_number, to_order

LEAST_LOGITS = 2048  # of a row: of fewer, select.py chooses all
HELD_LOGITS = 32768  # of a program: 128 KiB


class RowConfig(NamedTuple):
    """How the work is divided."""

    spans: int = 4  # that a pass takes, each of four logits of a thread
    warps: int = 8


# The fewer registers a thread has, the more programs share a multiprocessor, as long as shared memory has room for
# them: 4,096 tokens of 8,192 logits take 135 us with one span and 189 with four, of 32,768 904 and 770.
BY_LENGTH = {8192: RowConfig(spans=1), 16384: RowConfig(spans=2), HELD_LOGITS: RowConfig()}


def are_selected_by_hand(logits: Tensor, k: int) -> bool:
    """Whether the kernel takes f32 [T, S] rows of many tokens, and their k best."""
    size = logits.shape[1]
    return is_hopper(logits) and size > LEAST_LOGITS and (size <= HELD_LOGITS or 2 * k <= HELD_LOGITS)


def select_by_hand(logits: Tensor, positions: Tensor, k: int, config: RowConfig | None = None) -> Tensor:
    """As `select`, without pools."""
    (t, size), best, names, level = logits.shape, logits, None, 0
    how = config or next(how for most, how in BY_LENGTH.items() if min(size, HELD_LOGITS) <= most)
    while size > HELD_LOGITS:
        chunks = triton.cdiv(size, HELD_LOGITS)
        values = logits.new_empty(t, triton.cdiv(chunks * k, 16) * 16)
        places = torch.empty_like(values, dtype=torch.int32)
        _launch(best, names, positions, values, places, k, size, level, chunks, how)
        best, names, size, level = values, places, chunks * k, level + 1
    selection = torch.empty(t, k, dtype=torch.int32, device=logits.device)
    _launch(best, names, positions, None, selection, k, size, level, 1, how)
    return selection


def _launch(
    values: Tensor, names: Tensor | None, positions: Tensor, best: Tensor | None, places: Tensor, k: int, size: int,
    level: int, chunks: int, how: RowConfig,
) -> None:  # fmt: skip
    """The k best of each chunk of `size` values: `places` of `best` ones, or of the whole selection."""
    span = 4 * 32 * how.warps
    passes = triton.next_power_of_2(triton.cdiv(min(size, HELD_LOGITS), how.spans * span))
    select_rows[values.shape[0], chunks](
        values.view(torch.int32), names, positions, best, places, k, values.stride(0), places.stride(0), LEVEL=level,
        IS_LAST=best is None, HELD=HELD_LOGITS, PASSES=passes, SPANS=how.spans, SPAN=span, num_warps=how.warps,
    )  # fmt: skip


@gluon.jit
def _sum(x):
    return gl.sum(gl.sum(x, 1), 0)


@gluon.jit
def _keep_orders(bits, held, n, index, E: gl.constexpr):
    """The first n values as integers of the same order, into shared memory; the least, the greatest, sum and sum of
    squares."""
    SPANS: gl.constexpr = held.shape[1]
    SPAN: gl.constexpr = held.shape[2]
    passes = gl.cdiv(n, SPANS * SPAN)
    length = (n + 15) // 16 * 16  # rows are apart by as much at least; so the mask is the same for four neighbours
    for i in range(0, passes):
        at = i * (SPANS * SPAN) + index
        load_async(held.index(i), bits + at, mask=at < length)
    async_copy.commit_group()
    async_copy.wait_group(0)
    least, most = gl.full([SPANS, SPAN], 2147483647, gl.int32, E), gl.full([SPANS, SPAN], -2147483648, gl.int32, E)
    total, squares = gl.zeros([SPANS, SPAN], gl.float32, E), gl.zeros([SPANS, SPAN], gl.float32, E)
    for i in range(0, passes):
        there = i * (SPANS * SPAN) + index < n
        x = gl.where(there, held.index(i).load(E).to(gl.float32, bitcast=True), 0.0)
        # No order is the greatest integer, as a NaN's may be: one more would be the least, and all logits were taken.
        order = gl.where(there, gl.where(x < float("inf"), to_order(x), WRONG), -2147483648)
        held.index(i).store(order)
        least = gl.minimum(least, gl.where(there, order, 2147483647))
        most = gl.maximum(most, order)
        total += x
        squares += x * x
    return gl.min(gl.min(least, 1), 0), gl.max(gl.max(most, 1), 0), _sum(total), _sum(squares)


@gluon.jit
def _count_above(held, n, a, b, E: gl.constexpr):
    """How many orders are at least a, and at least b."""
    SPANS: gl.constexpr = held.shape[1]
    SPAN: gl.constexpr = held.shape[2]
    counts = gl.zeros([SPANS, SPAN], gl.int32, E)
    for i in range(0, gl.cdiv(n, SPANS * SPAN)):
        order = held.index(i).load(E)
        counts += (order >= a).to(gl.int32) + ((order >= b).to(gl.int32) << 16)
    packed = _sum(counts)
    return packed & 0xFFFF, (packed >> 16) & 0xFFFF


@gluon.jit
def _find_borders(held, n, k, low, greatest, total, squares, E: gl.constexpr):
    """As `find_best`: at least k orders are >= low, fewer are >= high; which has `at_high`."""
    high = greatest + 1
    at_low, at_high = n, 0
    if n <= k:
        high = low  # nothing to find: all are above
    mean = total / n
    deviation = gl.sqrt(gl.maximum(squares / n - mean * mean, 0.0))
    above_mean = gl.log((n - k).to(gl.float32) / k) / 1.702
    a = to_order(mean + deviation * (above_mean - 0.12))
    b = to_order(mean + deviation * (above_mean + 0.12))
    while (low + 1 < high) & (at_low != k):
        a = gl.minimum(gl.maximum(a, low + 1), high - 1)
        b = gl.minimum(gl.maximum(b, low + 1), high - 1)
        above_a, above_b = _count_above(held, n, a, b, E)
        before = at_low - at_high
        low, at_low, high, at_high = narrow(low, at_low, high, at_high, a, above_a, k)
        low, at_low, high, at_high = narrow(low, at_low, high, at_high, b, above_b, k)
        between = at_low - at_high
        part = 1.0 / between.to(gl.float32)
        share = (at_low - k).to(gl.float32) * part
        bound = 0.6 * gl.sqrt((share * (1.0 - share) + part) * part)
        is_poor = between * 4 > before
        first = to_number(low)
        width = to_number(high) - first
        a = to_order(first + width * (share - gl.where(is_poor, 0.0, bound)))
        b = gl.where(is_poor, (low & high) + ((low ^ high) >> 1), to_order(first + width * (share + bound)))
        b = gl.where(low == 0, 1, b)
    return low, high, at_high


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _count_up(counted):
    """The running count of [SPANS, SPAN], span after span, and the whole one."""
    FLAT: gl.constexpr = gl.BlockedLayout([counted.shape[0]], [32], [gl.num_warps()], [0])
    within, spans = gl.associative_scan(counted, 1, _add), gl.sum(counted, 1)
    before = gl.associative_scan(gl.convert_layout(spans, FLAT), 0, _add)
    return within + gl.expand_dims(gl.convert_layout(before, spans.type.layout) - spans, 1), gl.sum(spans, 0)


@gluon.jit
def select_rows(
    bits, names, positions, best, places, k, stride, to_stride, LEVEL: gl.constexpr, IS_LAST: gl.constexpr,
    HELD: gl.constexpr, PASSES: gl.constexpr, SPANS: gl.constexpr, SPAN: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """A program a token and a chunk of HELD values, which are given as bits."""
    E: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [1, num_warps], [1, 0])
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(vec=4, per_phase=1, max_phase=1, order=[1, 0])
    token = (gl.num_programs(0) - 1 - gl.program_id(0)).to(gl.int64)  # the longest contexts first
    chunk = gl.program_id(1)
    n = count_candidates(gl.load(positions + token).to(gl.int32), k, LEVEL, 1, HELD) - chunk * HELD
    if n > 0:
        n = gl.minimum(n, HELD)
        held = gl.allocate_shared_memory(gl.int32, [PASSES, SPANS, SPAN], FLAT)
        span = gl.arange(0, SPANS, layout=gl.SliceLayout(1, E)) * SPAN
        index = gl.expand_dims(span, 1) + gl.expand_dims(gl.arange(0, SPAN, layout=gl.SliceLayout(0, E)), 0)
        start = token * stride + chunk * HELD
        low, greatest, total, squares = _keep_orders(bits + start, held, n, index, E)
        low, high, at_high = _find_borders(held, n, k, low, greatest, total, squares, E)
        spare, before, to = k - at_high, 0, token * to_stride + chunk * k
        for i in range(0, gl.cdiv(n, SPANS * SPAN)):
            order, at = held.index(i).load(E), i * (SPANS * SPAN) + index
            above, reaches = order >= high, (order >= low) & (at < n)
            counts, whole = _count_up(above.to(gl.int32) + ((reaches & (order < high)).to(gl.int32) << 16))
            counts += before
            before += whole
            n_above, n_tied = counts & 0xFFFF, (counts >> 16) & 0xFFFF
            taken = above | (reaches & (n_tied <= spare))
            place = to + n_above + gl.minimum(n_tied, spare) - 1
            name = at + chunk * HELD
            if LEVEL > 0:
                name = gl.load(names + start + at, mask=taken, other=0)
            if IS_LAST:
                gl.store(places + place, gl.where(greatest == WRONG, -1, name), mask=taken)
            else:
                gl.store(places + place, name, mask=taken)
                gl.store(best + place, to_number(order), mask=taken)
        if IS_LAST:
            for column in range(n // (SPANS * SPAN) * (SPANS * SPAN), k, SPANS * SPAN):
                at = column + index
                gl.store(places + to + at, gl.full([SPANS, SPAN], -1, gl.int32, E), mask=(at >= n) & (at < k))
