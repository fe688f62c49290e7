"""y = x @ w.T for up to 64 tokens, as fast as the weights can be read.

Columns are split over programs, so that many on each multiprocessor read at the same time. The last program to finish a
block of rows adds the parts, always in the same order. Tokens are columns of a tensor core product, of which there are
16 at least: up to 8 tokens, the high and low numbers of their activations share them, at no cost. Several matrices of
one input share a launch.

Reference: `linear` in reference.py, which also computes what no kernel here reads. Serves up to SPLIT_TOKENS tokens;
weights in FP8 by 128 x 128, or BF16. Activations keep 22 bits beside FP8 codes and 16 beside BF16. Measured: the head's
232 MB take 59 us, 72 at 64 tokens (tools/kernel_bench/batch.py). Next: activations.py, gemm.py.
"""

from collections.abc import Sequence
from math import inf
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.kernels import reference
from saccade.kernels.activations import Activations, Beside, Formats, dot, write_activations
from saccade.kernels.launch import PROCESSORS, begin, can_be_tiled, uses_pdl, wait
from saccade.kernels.types import SCALE_BLOCK, SPLIT_TOKENS, Matrix


class SplitKConfig(NamedTuple):
    """How the work is divided."""

    rows: int = 64  # of weights in a block; 128 at most
    columns: int = 128  # of a tile; BF16 halves it
    programs: int = 528  # to aim at: four on each of 132 multiprocessors
    least: int = 2  # tiles a program takes at least
    warps: int = 4
    stages: int = 3
    prefetch: bool = True  # weights into the L2 cache before the kernels in front have ended


NOTHING = Formats()
SPLIT_K = SplitKConfig()
# What L2 does not hold: the head's 232 MB, 90 -> 59 us.
SPLIT_K_LONG = SplitKConfig(columns=256, programs=264, stages=4, prefetch=False)
LONG_BYTES = 32 << 20
# Of 17 to 32 tokens, and of 33 to 64: `choose_split` takes one of these by the matrix. Four tiles in flight are fastest
# where all programs fit, two or three where more of them do. Tokens of 64: qkv_a 22 us, before 26; q_b and wq_b 20 and
# 25; the head 72 and 86; of 32: 14.7 and 17.9, 13.2 and 15.3.
SPLIT_K_32 = (SplitKConfig(stages=4), SplitKConfig())
SPLIT_K_64 = (SplitKConfig(rows=128, warps=8, stages=4), SplitKConfig(stages=2), SplitKConfig(stages=4))
SHARED_BYTES = 227 << 10  # of a multiprocessor
ADDED_TOKENS = 512  # of all parts together, which a block's last program adds
# Guessed. With them each choice above is the fastest of 20, or within 1 us. In tiles: what a program takes beside its
# own, and what each part adds to it. And how much longer programs take that find no room at first.
OVERHEAD_TILES, ADDED_TILES, LATE_FACTOR = 3, 0.25, 1.15


def find_format(w: Matrix) -> str | None:
    """What the kernels make of a matrix [n, k]: "fp16" for FP8 codes in blocks, "bf16" for BF16, else None."""
    data = w.data
    if data.ndim != 2 or not data.is_contiguous():
        return None
    if w.scale is not None:
        is_block = w.code == "e4m3" and data.dtype == torch.float8_e4m3fn and w.group == (128, 128)
        fits = is_block and w.scale.dtype == torch.float32 and w.scale.is_contiguous() and can_be_tiled(data)
        return "fp16" if fits and w.global_scale is None else None
    return "bf16" if data.dtype == torch.bfloat16 and data.shape[1] % 8 == 0 else None


@triton.jit
def _fetch(codes, row, K, first, LINES: tl.constexpr, STEP: tl.constexpr, BM: tl.constexpr):
    """Ask for lines of 128 bytes, from column `first` of each row on, to be brought to the L2 cache."""
    line = tl.arange(0, LINES)
    column = tl.minimum(first + line * STEP, K - 1)
    at = codes + row.to(tl.int64)[:, None] * K + column[None, :]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _stream(
    x, codes, scales, row, first, K: tl.constexpr, SPAN: tl.constexpr, FP16: tl.constexpr, BM: tl.constexpr,
    WIDTH: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """[BM, WIDTH]: SPAN columns from `first` on of a block of rows times those of x [WIDTH, K]; scales [GROUPS],
    one for each 128 of these columns."""
    k = first + tl.arange(0, BK)
    code_at = codes + row.to(tl.int64)[:, None] * K + k[None, :]
    x_at = x + tl.arange(0, WIDTH)[None, :] * K + k[:, None]
    total = tl.zeros([BM, WIDTH], tl.float32)
    for start in range(0, SPAN, BK):
        if EVEN:
            weights = tl.load(code_at + start, eviction_policy="evict_first")
            part = tl.load(x_at + start)
        else:
            weights = tl.load(code_at + start, mask=k[None, :] < K - start, other=0.0, eviction_policy="evict_first")
            part = tl.load(x_at + start, mask=k[:, None] < K - start, other=0.0)
        if FP16:
            product = dot(weights.to(tl.float16), part, tl.zeros([BM, WIDTH], tl.float32))
            total += product * tl.sum(tl.where(tl.arange(0, GROUPS) == start // 128, scales, 0.0), 0)
        else:
            total = dot(weights, part, total)
    return total


@triton.jit
def _multiply_block(
    x, unit, codes, scale, residual, partial, counter, y, T, rows, block, part, scale_stride, y_stride, base,
    K: tl.constexpr, SPAN: tl.constexpr, FP16: tl.constexpr, RESIDUAL: tl.constexpr, TOKENS: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr,
    PARTS: tl.constexpr, EVEN: tl.constexpr, GROUPS: tl.constexpr, FETCH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Columns `part` * SPAN and on of one block of rows; and, if no other part is missing, the block of y."""
    first = part * SPAN
    row = block * BM + tl.arange(0, BM)
    inside = tl.minimum(row, rows - 1)
    scales = tl.zeros([GROUPS], tl.float32)
    if FP16:  # all of them now: each would be waited for when its turn comes
        at = first // 128 + tl.arange(0, GROUPS)
        scales = tl.load(scale + block * BM // 128 * scale_stride + at, mask=at * 128 < K, other=0.0)
    if FETCH:
        _fetch(codes, inside, K, first, GROUPS if FP16 else 2 * GROUPS, 128 if FP16 else 64, BM)
    wait(PDL)
    total = _stream(x, codes, scales, inside, first, K, SPAN, FP16, BM, 2 * TOKENS, BK, EVEN, GROUPS)
    total = tl.trans(tl.sum(tl.reshape(total, [BM, 2, TOKENS]), 1))  # high + low: [TOKENS, BM]
    token = tl.arange(0, TOKENS)
    here = token[:, None] < T
    is_last = part == PARTS - 1
    if PARTS > 1:
        at = partial + token[:, None] * BM + tl.arange(0, BM)[None, :]
        tl.store(at + part * TOKENS * BM, total, mask=here)
        tl.debug_barrier()  # all of this program's numbers, before any thread says that they are there
        is_last = tl.atomic_add(counter, 1, sem="acq_rel") == PARTS - 1
    if is_last:
        if PARTS > 1:
            total = tl.zeros([TOKENS, BM], tl.float32)
            for other in tl.static_range(PARTS):
                total += tl.load(at + other * TOKENS * BM, mask=here, other=0.0, cache_modifier=".cg")
        if FP16:
            total *= tl.load(unit + token, mask=token < T, other=0.0)[:, None]
        place = token[:, None] * y_stride + base + row[None, :]
        mask = here & (row[None, :] < rows)
        if RESIDUAL:
            total += tl.load(residual + place, mask=mask, other=0.0)
        tl.store(y + place, total, mask=mask)


@triton.jit(do_not_specialize=["T", "first_blocks", "base"], do_not_specialize_on_alignment=["counters"])
def split_k_kernel(
    fp16, bf16, unit, first, first_scale, second, second_scale, residual, partial, counters, y, T, first_rows,
    second_rows, first_blocks, scale_stride, y_stride, base, K: tl.constexpr, SPAN: tl.constexpr, FIRST: tl.constexpr,
    SECOND: tl.constexpr, RESIDUAL: tl.constexpr, TOKENS: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    PARTS: tl.constexpr, EVEN: tl.constexpr, GROUPS: tl.constexpr, FETCH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y [T, base + first_rows + second_rows], from column `base` on: `first` [first_rows, K], then `second`, each FP8
    ("fp16") or BF16 ("bf16"), or no second (""). A block of rows has PARTS programs of SPAN columns."""
    begin(PDL)
    block = tl.program_id(0) // PARTS
    part = tl.program_id(0) % PARTS
    partial += block * PARTS * TOKENS * BM
    counters += block
    if SECOND == "":
        _multiply_block(
            fp16 if FIRST == "fp16" else bf16, unit, first, first_scale, residual, partial, counters, y, T,
            first_rows, block, part, scale_stride, y_stride, base, K, SPAN, FIRST == "fp16", RESIDUAL, TOKENS, BM,
            BK if FIRST == "fp16" else BK // 2, PARTS, EVEN, GROUPS, FETCH, PDL,
        )  # fmt: skip
    else:
        if block < first_blocks:
            _multiply_block(
                fp16 if FIRST == "fp16" else bf16, unit, first, first_scale, residual, partial, counters, y, T,
                first_rows, block, part, scale_stride, y_stride, base, K, SPAN, FIRST == "fp16", RESIDUAL, TOKENS, BM,
                BK if FIRST == "fp16" else BK // 2, PARTS, EVEN, GROUPS, FETCH, PDL,
            )  # fmt: skip
        else:
            _multiply_block(
                fp16 if SECOND == "fp16" else bf16, unit, second, second_scale, residual, partial, counters, y, T,
                second_rows, block - first_blocks, part, scale_stride, y_stride, base + first_rows, K, SPAN,
                SECOND == "fp16", RESIDUAL, TOKENS, BM, BK if SECOND == "fp16" else BK // 2, PARTS, EVEN, GROUPS,
                FETCH, PDL,
            )  # fmt: skip


def split_k(
    x: Tensor,
    parts: Sequence[Matrix],
    norm: tuple[Tensor, float] | None = None,
    residual: Tensor | None = None,
    gated: bool = False,
    limit: float = inf,
    config: SplitKConfig | None = None,
    beside: Beside | None = None,
) -> Tensor:
    """See `split_k_and_input`."""
    return split_k_and_input(x, parts, norm, residual, gated, limit, config, beside)[0]


def split_k_and_input(
    x: Tensor,
    parts: Sequence[Matrix],
    norm: tuple[Tensor, float] | None = None,
    residual: Tensor | None = None,
    gated: bool = False,
    limit: float = inf,
    config: SplitKConfig | None = None,
    beside: Beside | None = None,
    keep: Formats = NOTHING,
) -> tuple[Tensor, Activations]:
    """f32 [T, sum of rows] = x [T, k] @ each of `parts` [rows, k].T, side by side, for T <= 64.

    norm: weight [k] and epsilon of an RMS norm in front. gated: x is [T, 2 k], and silu of its first half times the
    second, within the `limit` of `silu_and_mul`, is multiplied. residual: f32 [T, sum of rows], added. x may be a view
    with a stride between rows. Neighbours share a launch, two by two. Parts that no kernel reads are multiplied as
    reference.py says, in fp32. beside: what else the launch does that prepares the input. The input as it was
    multiplied comes back too, behind the norm, for other products, with what they `keep`: FP16 numbers permuted, where
    no part has FP8 codes.
    """
    formats = [find_format(w) for w in parts]
    widths = [w.data.shape[-2] for w in parts]
    tokens, k = x.shape[0], x.shape[1] // 2 if gated else x.shape[1]
    config = config or choose_split(tokens, k, widths, sum(w.data.nbytes for w in parts))
    assert tokens <= SPLIT_TOKENS, f"split_k: expected at most {SPLIT_TOKENS} tokens, found {tokens}"
    assert SCALE_BLOCK % config.rows == 0 and config.columns % SCALE_BLOCK == 0, f"{config}: parts of scales"
    blocks = sum(-(-n // config.rows) for n in widths)
    counters = torch.empty(max(1, blocks), dtype=torch.int32, device=x.device)
    assert not (keep.fp16 and "fp16" in formats), "one order of FP16 numbers for each launch"
    written = write_activations(
        x, norm=norm, gated=gated, limit=limit, fp32=keep.fp32 or None in formats, fp16=keep.fp16 or "fp16" in formats,
        bf16=2 * ("bf16" in formats), pad=find_room(tokens), permuted=keep.fp16, counters=counters, beside=beside,
    )  # fmt: skip
    y = torch.empty(tokens, sum(widths), dtype=torch.float32, device=x.device)
    done = 0
    for group in _pair(formats):
        chosen = [(parts[i], formats[i]) for i in group]
        done += _launch(written, chosen, y, residual, sum(widths[: group[0]]), k, counters[done:], config)
    for i, name in enumerate(formats):
        if name is None:
            here = slice(sum(widths[:i]), sum(widths[: i + 1]))
            product = reference.linear(written.fp32, parts[i])
            y[:, here] = product if residual is None else product + residual[:, here]
    return y, written


def choose_split(tokens: int, k: int, widths: Sequence[int], nbytes: int) -> SplitKConfig:
    """For matrices of `widths` rows and k columns, of so many bytes: up to 16 tokens what was fastest on an H200."""
    if tokens <= 16:
        return SPLIT_K if nbytes < LONG_BYTES else SPLIT_K_LONG
    found = [divide(how, tokens, k, widths) for how in (SPLIT_K_32 if tokens <= 32 else SPLIT_K_64)]
    return min(found, key=lambda pair: pair[0])[1]._replace(prefetch=nbytes < LONG_BYTES)


def divide(how: SplitKConfig, tokens: int, k: int, widths: Sequence[int]) -> tuple[float, SplitKConfig]:
    """`how` with the number of programs whose longest multiprocessor has the least to do, and what that is: rows of
    tiles, those of programs that share it together. Programs that find no room at first are waited for: 176 where 132
    fit take as long as 264."""
    room, blocks, tiles = find_room(tokens), sum(-(-n // how.rows) for n in widths), -(-k // SCALE_BLOCK)
    tile = SCALE_BLOCK * (how.rows + 2 * 2 * room)  # bytes: codes, and two numbers of each activation
    each = max(1, SHARED_BYTES // (how.stages * tile))  # programs that share a multiprocessor

    def cost(parts: int) -> float:
        waves = -(-blocks * parts // (PROCESSORS * each))
        late = 1 if waves == 1 else LATE_FACTOR
        return late * waves * each * how.rows * (tiles / parts + OVERHEAD_TILES + ADDED_TILES * parts)

    counts = [d for d in range(1, tiles + 1) if tiles % d == 0 and (d == 1 or d * room <= ADDED_TOKENS)]
    parts = min(counts, key=cost)
    return cost(parts), how._replace(programs=blocks * parts, least=1)


def find_room(tokens: int) -> int:
    """Columns that a product has for the high numbers of its tokens, and as many for the low ones."""
    return max(8, triton.next_power_of_2(tokens))


def _launch(
    x: Activations, parts: Sequence[tuple[Matrix, str | None]], y: Tensor, residual: Tensor | None, base: int, k: int,
    counters: Tensor, how: SplitKConfig,
) -> int:  # fmt: skip
    """One or two parts of one input into y, from column `base` on. Returns how many blocks of rows, and so counters,
    they took."""
    (one, first), (two, second) = parts[0], parts[-1]
    rows = [w.data.shape[-2] for w, _ in parts]
    blocks, tokens, room = [-(-n // how.rows) for n in rows], len(y), find_room(len(y))
    columns = how.columns if k % how.columns == 0 else SCALE_BLOCK  # else the last tile is masked
    if any(name != "bf16" for _, name in parts):
        columns = min(columns, SCALE_BLOCK)  # codes of a tile share a scale
    count = divide_tiles(-(-k // columns), how.programs / sum(blocks), how.least)
    span = -(-k // columns) // count * columns
    partial = y.new_empty(sum(blocks) * count * room * how.rows if count > 1 else 0)
    pdl = uses_pdl(y)
    split_k_kernel[(sum(blocks) * count,)](
        x.fp16.numbers, x.bf16.numbers, x.fp16.unit, one.data, y if one.scale is None else one.scale, two.data,
        y if two.scale is None else two.scale, y if residual is None else residual, partial, counters, y, tokens,
        rows[0], rows[-1], blocks[0], -(-k // 128), y.shape[1], base, K=k, SPAN=span, FIRST=first,
        SECOND=second if len(parts) > 1 else "", RESIDUAL=residual is not None, TOKENS=room, BM=how.rows, BK=columns,
        PARTS=count, EVEN=k % columns == 0, GROUPS=triton.next_power_of_2(-(-span // 128)), FETCH=how.prefetch and pdl,
        PDL=pdl, num_warps=how.warps, num_stages=how.stages, launch_pdl=pdl,
    )  # fmt: skip
    return sum(blocks)


def _pair(formats: Sequence[str | None]) -> list[list[int]]:
    """Which parts share a launch: neighbours, two by two."""
    launches: list[list[int]] = []
    for i, name in enumerate(formats):
        if name is not None and launches and launches[-1] == [i - 1]:
            launches[-1].append(i)
        elif name is not None:
            launches.append([i])
    return launches


def divide_tiles(tiles: int, wanted: float, least: int) -> int:
    """Into how many equal parts to divide `tiles`: near `wanted` and of `least` tiles at least."""
    fits = [d for d in range(1, tiles + 1) if tiles % d == 0 and tiles // d >= least] or [1]
    return min(fits, key=lambda d: max(d / wanted, wanted / d))
