"""The best k of a token's logits: `select` of reference.py without a sort, and the absorption of the queries beside it.

One program holds 16,384 logits in registers as integers of the same order and closes in on the k-th largest: three
thresholds a round, until one parts exactly k from the rest or only equal logits are left between them. A running count
then gives each one taken its place. Longer contexts go in chunks of that many, whose best are put to the same test.
The queries of the attention do not wait for the selection: they are absorbed by other programs of the last launch.
Knows neither keys nor the cache. Next: attend.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.kernels.launch import begin, uses_pdl, wait
from saccade.kernels.reference import Rotation, Selection

CHUNK = 16384  # logits that a program can hold: 32 registers a thread of 512
COLUMNS = 64  # of w_uk in one program: 128 programs at 16 heads
WARPS = 16  # of a selection; 32 halve what a thread holds and leave it 64 registers
LEAST = -2147483648  # below the integer of every logit


def select(logits: Tensor, positions: Tensor, k: int, num_warps: int = WARPS, block: int = CHUNK) -> Selection:
    """i32 [T, min(k, S)]: positions of the k best logits up to the token's own, ascending, -1 padded.

    logits: f32 [T, S]; of equal ones the lowest positions win. What follows a token's position makes no
    difference; S is a multiple of 16. k is at
    most half of `block`, the logits of a program.
    """
    return _launch(logits, positions, k, None, None, None, num_warps, block, COLUMNS)[0]


def select_and_absorb(
    logits: Tensor,
    positions: Tensor,
    k: int,
    q: Tensor,
    w_uk: Tensor,
    rotation: Rotation,
    num_warps: int = WARPS,
    block: int = CHUNK,
    columns: int = COLUMNS,
) -> tuple[Selection, Tensor]:
    """`select` and `absorb` in one launch: neither needs the other, and a selection occupies one SM a token."""
    selection, absorbed = _launch(logits, positions, k, q, w_uk, rotation, num_warps, block, columns)
    assert absorbed is not None
    return selection, absorbed


def absorb(q: Tensor, w_uk: Tensor, rotation: Rotation, num_warps: int = 8, columns: int = COLUMNS) -> Tensor:
    """f32 [T, heads, kv_lora + rope]: queries as they meet the latents, q_nope @ w_uk and the rotated q_rope.

    q: f32 [T, heads, nope + rope], not rotated yet; w_uk: [heads, nope, kv_lora]; pairs are neighbours. Products are
    fp32. Meant for few tokens: a program takes one after the other.
    """
    out, sizes, pdl = _absorbed(q, w_uk, columns), _sizes(w_uk, rotation, columns), uses_pdl(q)
    _absorb_alone[(w_uk.shape[0] * sizes["BLOCKS"],)](
        q, w_uk, rotation.cos, rotation.sin, out, q.shape[0], q.stride(0), **sizes, PDL=pdl, num_warps=num_warps,
        launch_pdl=pdl,
    )  # fmt: skip
    return out


def _launch(
    logits: Tensor, positions: Tensor, k: int, q: Tensor | None, w_uk: Tensor | None, rotation: Rotation | None,
    num_warps: int, block: int, columns: int,
) -> tuple[Selection, Tensor | None]:  # fmt: skip
    t, size = logits.shape
    assert logits.stride(1) == 1 and logits.dtype == torch.float32 and size % 16 == 0
    k = min(k, size)
    assert size <= block or 2 * k <= block, f"{k} of {size} logits, in chunks of {block}, do not grow fewer"
    pdl, common = uses_pdl(logits), {"num_warps": num_warps, "launch_pdl": uses_pdl(logits)}
    best, names, level = logits, None, 0
    while size > block:
        chunks = triton.cdiv(size, block)
        values = logits.new_empty(t, triton.cdiv(chunks * k, 16) * 16)
        places = torch.empty_like(values, dtype=torch.int32)
        _select_chunk[(t, chunks)](
            best, names, positions, values, places, k, best.stride(0), values.stride(0), LEVEL=level, BLOCK=block,
            PDL=pdl, **common,
        )  # fmt: skip
        best, names, size, level = values, places, chunks * k, level + 1
    selection = torch.empty(t, k, dtype=torch.int32, device=logits.device)
    absorbed, programs = None, t
    sizes = {"HEADS": 1, "NOPE": 1, "ROPE": 2, "LORA": 1, "COLUMNS": 1, "BLOCKS": 1, "ROWS": 1}
    if q is not None and w_uk is not None and rotation is not None:
        absorbed, sizes = _absorbed(q, w_uk, columns), _sizes(w_uk, rotation, columns)
        programs += w_uk.shape[0] * sizes["BLOCKS"]
    cos, sin = rotation or (None, None)
    _select_last[(programs,)](
        best, names, positions, selection, k, best.stride(0), q, w_uk, cos, sin, absorbed, t,
        0 if q is None else q.stride(0), LEVEL=level, LENGTH=block, BLOCK=min(triton.next_power_of_2(size), block),
        WIDTH=triton.next_power_of_2(k), **sizes, PDL=pdl, **common,
    )  # fmt: skip
    return selection, absorbed


def _absorbed(q: Tensor, w_uk: Tensor, columns: int) -> Tensor:
    heads, nope, lora = w_uk.shape
    assert q.dtype == torch.float32 and q.stride(2) == 1 and q.stride(1) == q.shape[2] and w_uk.is_contiguous()
    return q.new_empty(q.shape[0], heads, lora + q.shape[2] - nope)


def _sizes(w_uk: Tensor, rotation: Rotation, columns: int) -> dict[str, int]:
    heads, nope, lora = w_uk.shape
    return {
        "HEADS": heads, "NOPE": nope, "ROPE": 2 * rotation.cos.shape[1], "LORA": lora, "COLUMNS": columns,
        "BLOCKS": triton.cdiv(lora, columns), "ROWS": triton.next_power_of_2(nope),
    }  # fmt: skip


@triton.jit
def _count(position, k, LEVEL: tl.constexpr, BLOCK: tl.constexpr):
    """Candidates of a token after LEVEL rounds in chunks: all chunks but the last gave k, so they lie without gaps."""
    n = position + 1
    for _ in tl.static_range(LEVEL):
        before = (n - 1) // BLOCK
        n = before * k + tl.minimum(k, n - before * BLOCK)
    return n


@triton.jit
def _order(x):
    """f32 as integers of the same order; both zeros are one."""
    bits = x.to(tl.int32, bitcast=True)
    bits = tl.where(bits == -2147483648, 0, bits)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def find_best(values, n, k, BLOCK: tl.constexpr):
    """Of values[:n], at most BLOCK: which are the k best, [BLOCK] bool, each one's place among them, and their number.

    Invariant: at least k are >= low, fewer than k are >= high. A round leaves a quarter of the range between them; the
    first also parts the exact zeros, of which relu makes many.
    """
    index = tl.arange(0, BLOCK)
    x = tl.load(values + index, mask=index < (n + 15) // 16 * 16, other=0.0)  # wide loads
    order = tl.where(index < n, _order(x), -2147483648)
    low = tl.min(tl.where(index < n, order, 2147483647), 0).to(tl.int64)
    high = tl.max(order, 0).to(tl.int64) + 1
    at_low, at_high = n, 0
    if n <= k:
        at_low = k  # nothing to find: all
    a, b = tl.full([], 0, tl.int64), tl.full([], 1, tl.int64)
    while (high - low > 1) & (at_low != k):
        c = low + ((high - low) * 3 >> 2)
        a = tl.minimum(tl.maximum(a, low + 1), high - 1)
        b = tl.minimum(tl.maximum(b, low + 1), high - 1)
        c = tl.minimum(tl.maximum(c, low + 1), high - 1)
        packed = (order >= a.to(tl.int32)).to(tl.int64)
        packed += (order >= b.to(tl.int32)).to(tl.int64) << 16
        packed += (order >= c.to(tl.int32)).to(tl.int64) << 32
        packed = tl.sum(packed, 0)
        at_a = (packed & 0xFFFF).to(tl.int32)
        at_b = ((packed >> 16) & 0xFFFF).to(tl.int32)
        at_c = (packed >> 32).to(tl.int32)
        low, at_low, high, at_high = _narrow(low, at_low, high, at_high, a, at_a, k)
        low, at_low, high, at_high = _narrow(low, at_low, high, at_high, b, at_b, k)
        low, at_low, high, at_high = _narrow(low, at_low, high, at_high, c, at_c, k)
        a, b = low + ((high - low) >> 2), low + ((high - low) >> 1)
    above = order >= high.to(tl.int32)
    tied = (order >= low.to(tl.int32)) & (index < n) & (order < high.to(tl.int32))
    if n <= k:
        above = index < n
        tied = index < 0
    counts = tl.cumsum(above.to(tl.int32) + (tied.to(tl.int32) << 16), 0)
    n_above, n_tied = counts & 0xFFFF, counts >> 16
    spare = k - at_high
    taken = above | (tied & (n_tied <= spare))
    return taken, n_above + tl.minimum(n_tied, spare) - 1, tl.minimum(n, k)


@triton.jit
def _narrow(low, at_low, high, at_high, threshold, count, k):
    enough = count >= k
    raises, lowers = enough & (threshold > low), (count < k) & (threshold < high)
    low, at_low = tl.where(raises, threshold, low), tl.where(raises, count, at_low)
    high, at_high = tl.where(lowers, threshold, high), tl.where(lowers, count, at_high)
    return low, at_low, high, at_high


@triton.jit
def _select_chunk(
    values, names, positions, best, places, k, stride, to_stride, LEVEL: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """The best k of one chunk, with their positions, to where that chunk's belong."""
    begin(PDL)
    wait(PDL)
    token, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    n = _count(tl.load(positions + token).to(tl.int32), k, LEVEL, BLOCK) - chunk * BLOCK
    if n > 0:
        n = tl.minimum(n, BLOCK)
        start = token * stride + chunk * BLOCK
        taken, place, _ = find_best(values + start, n, k, BLOCK)
        index = tl.arange(0, BLOCK)
        x = tl.load(values + start + index, mask=taken, other=0.0)
        name = chunk * BLOCK + index if LEVEL == 0 else tl.load(names + start + index, mask=taken, other=0)
        to = token * to_stride + chunk * k + place
        tl.store(best + to, x, mask=taken)
        tl.store(places + to, name, mask=taken)


@triton.jit(do_not_specialize=["n_tokens"])
def _select_last(
    values, names, positions, selection, k, stride, q, w_uk, cos, sin, absorbed, n_tokens, q_stride,
    LEVEL: tl.constexpr, LENGTH: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, HEADS: tl.constexpr,
    NOPE: tl.constexpr, ROPE: tl.constexpr, LORA: tl.constexpr, COLUMNS: tl.constexpr, BLOCKS: tl.constexpr,
    ROWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    begin(PDL)
    program = tl.program_id(0)
    if program < n_tokens:
        wait(PDL)
        token = program.to(tl.int64)
        n = _count(tl.load(positions + token).to(tl.int32), k, LEVEL, LENGTH)
        taken, place, count = find_best(values + token * stride, n, k, BLOCK)
        index = tl.arange(0, BLOCK)
        name = index
        if LEVEL > 0:
            name = tl.load(names + token * stride + index, mask=taken, other=0)
        tl.store(selection + token * k + place, name, mask=taken)
        column = tl.arange(0, WIDTH)
        tl.store(selection + token * k + column, tl.full([WIDTH], -1, tl.int32), mask=(column >= count) & (column < k))
    elif HEADS * LORA > 1:
        absorb_block(
            program - n_tokens, q, w_uk, cos, sin, absorbed, n_tokens, q_stride, HEADS, NOPE, ROPE, LORA, COLUMNS,
            BLOCKS, ROWS, PDL,
        )  # fmt: skip


@triton.jit(do_not_specialize=["n_tokens"])
def _absorb_alone(
    q, w_uk, cos, sin, absorbed, n_tokens, q_stride, HEADS: tl.constexpr, NOPE: tl.constexpr, ROPE: tl.constexpr,
    LORA: tl.constexpr, COLUMNS: tl.constexpr, BLOCKS: tl.constexpr, ROWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    begin(PDL)
    absorb_block(
        tl.program_id(0), q, w_uk, cos, sin, absorbed, n_tokens, q_stride, HEADS, NOPE, ROPE, LORA, COLUMNS, BLOCKS,
        ROWS, PDL,
    )  # fmt: skip


@triton.jit
def absorb_block(
    program, q, w_uk, cos, sin, absorbed, n_tokens, q_stride, HEADS: tl.constexpr, NOPE: tl.constexpr,
    ROPE: tl.constexpr, LORA: tl.constexpr, COLUMNS: tl.constexpr, BLOCKS: tl.constexpr, ROWS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """COLUMNS of one head's absorbed query, for every token; the head's first program also turns its rope part."""
    head, block = program // BLOCKS, program % BLOCKS
    row, column = tl.arange(0, ROWS), block * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < NOPE)[:, None] & (column < LORA)[None, :]
    w = tl.load(w_uk + (head * NOPE + row[:, None]) * LORA + column[None, :], mask=inside, other=0.0)
    wait(PDL)
    WIDTH: tl.constexpr = LORA + ROPE
    source, to = q + head * (NOPE + ROPE), absorbed + head * WIDTH
    x = tl.load(source + row, mask=row < NOPE, other=0.0)
    for token in range(n_tokens):
        more = (row < NOPE) & (token + 1 < n_tokens)
        following = tl.load(source + (token + 1) * q_stride + row, mask=more, other=0.0)
        y = tl.sum(w.to(tl.float32) * x[:, None], 0)
        tl.store(to + token * (HEADS * WIDTH) + column, y, mask=column < LORA)
        x = following
    if block == 0:
        pair = tl.arange(0, ROPE // 2)
        for token in range(n_tokens):
            c, s = tl.load(cos + token * (ROPE // 2) + pair), tl.load(sin + token * (ROPE // 2) + pair)
            a = tl.load(source + token * q_stride + NOPE + 2 * pair)
            b = tl.load(source + token * q_stride + NOPE + 2 * pair + 1)
            turned = to + token * (HEADS * WIDTH) + LORA + 2 * pair
            tl.store(turned, a * c - b * s)
            tl.store(turned + 1, b * c + a * s)
