"""Keys and values of each head, made from the latents of a context: what un-absorbed attention multiplies.

For 8,192 positions and 16 heads that is 34 GFLOP and 67 MB written, in BF16; 134 MB as two BF16 numbers each, which
keep 16 bits. Latents are read page by page, where they lie.

A row that is not finite gets a key that is no number and a value of zeros: who sees it gets no number, and who does not
is spared it (no weight times a NaN is a NaN).

Reference: `linear` in reference.py. Serves w_uk and w_uv in BF16; latents in BF16, or codes, whose products are scaled
behind the loop: powers of two are exact there too. Next: masked.py.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from saccade.kernels import PAGE
from saccade.kernels.activations import dot, split_in_two
from saccade.kernels.attention.latents import find_row, pass_latents
from saccade.kernels.types import Latents

LATENT_COLUMNS = 64  # in a step
# Loads are not made ahead: Triton 3.6 would load into latents that a product still reads where something else reads
# them too. Values were 40 % off; in a loop for each product the last bits changed from run to run. It costs 50 us of
# 1,060.
STAGES = 1


class Expanded(NamedTuple):
    """Of the requests of a step one after the other, `pages` pages each, behind one another for each head and part."""

    keys: Tensor  # bf16 [parts * heads * rows, nope]
    rope: Tensor  # bf16 [rows, rope]: of all heads
    values: Tensor  # bf16 [parts * heads * rows, v]


def count_expanded_bytes(rows: int, heads: int, nope: int, v: int, parts: int) -> int:
    """Bytes of `Expanded`, but for the rope, which is there anyway."""
    return rows * heads * (nope + v) * parts * 2


def expand_latents(
    latent: Latents, page_table: Tensor, lengths: Tensor, w_uk: Tensor, w_uv: Tensor, parts: int
) -> Expanded:
    """latent: the pool; page_table: [R, P]; lengths: [R] tokens in the cache; w_uk: [heads,
    nope, kv_lora] and w_uv: [heads, v, kv_lora], of the heads that are wanted. Rows behind a length are zeros in its
    last page, and unwritten beyond."""
    (heads, nope, lora), v, (requests, pages) = w_uk.shape, w_uv.shape[1], page_table.shape
    rows, rope = requests * pages * PAGE, latent.width - lora
    keys, values = (w_uk.new_empty(parts * heads * rows, width) for width in (nope, v))
    turned = w_uk.new_empty(rows, rope)
    _expand[requests * pages, heads, 2](
        *pass_latents(latent), page_table, lengths, w_uk, w_uv, keys, turned, values, pages, page_table.stride(0),
        w_uk.stride(0), w_uv.stride(0), rows, heads * rows, LORA=lora, NOPE=nope, ROPE=rope, V=v, K_ROW=w_uk.stride(1),
        V_ROW=w_uv.stride(1), PARTS=parts, PAGE=PAGE, BK=min(LATENT_COLUMNS, lora),
        CODED=latent.scales is not None, num_warps=4, num_stages=STAGES,
    )  # fmt: skip
    return Expanded(keys, turned, values)


@triton.jit
def _store_parts(at, x, behind, PARTS: tl.constexpr):
    high, low = split_in_two(x, tl.bfloat16)
    tl.store(at, high)
    if PARTS > 1:
        tl.store(at + behind, low)


@triton.jit
def _multiply_latents(at, there, w, ROW: tl.constexpr, LORA: tl.constexpr, N: tl.constexpr, BK: tl.constexpr):
    """[PAGE, N]: latents times N rows of w; and [PAGE] zeros, or no number where a latent is not finite."""
    PAGE: tl.constexpr = at.shape[0]
    column, n = tl.arange(0, BK), tl.arange(0, N)
    total, nothing = tl.zeros([PAGE, N], tl.float32), tl.zeros([PAGE], tl.float32)
    for start in range(0, LORA, BK):
        x = tl.load(at + start + column[None, :], mask=there, other=0.0)
        x = x.to(w.dtype.element_ty)  # codes are exact
        total = dot(x, tl.load(w + n[None, :] * ROW + start + column[:, None]), total)
        nothing += tl.sum(x.to(tl.float32) * 0.0, 1)
    return total, nothing


@triton.jit(do_not_specialize=["pages", "table_stride", "rows", "span"])
def _expand(
    latent, rope, scales, page_table, lengths, w_uk, w_uv, keys, turned, values, pages, table_stride, k_head, v_head,
    rows, span, LORA: tl.constexpr, NOPE: tl.constexpr, ROPE: tl.constexpr, V: tl.constexpr, K_ROW: tl.constexpr,
    V_ROW: tl.constexpr, PARTS: tl.constexpr, PAGE: tl.constexpr, BK: tl.constexpr,
    CODED: tl.constexpr,
):  # fmt: skip
    """A program a page, head, and its keys (0) or its values."""
    request, page, head = tl.program_id(0) // pages, tl.program_id(0) % pages, tl.program_id(1)
    length = tl.load(lengths + request).to(tl.int32)
    if page * PAGE < length:
        offset = tl.arange(0, PAGE)
        there = (page * PAGE + offset < length)[:, None]
        row = tl.load(page_table + request * table_stride + page).to(tl.int64) * PAGE + offset
        at, rope_at = find_row(latent, rope, row[:, None], LORA, ROPE, CODED)
        factor = tl.load(scales + row, mask=page * PAGE + offset < length, other=0.0)[:, None] if CODED else 1.0
        place = tl.program_id(0).to(tl.int64) * PAGE + offset
        out = (head.to(tl.int64) * rows + place)[:, None]
        behind = span.to(tl.int64)
        if tl.program_id(2) == 0:
            w = w_uk + head.to(tl.int64) * k_head
            key, nothing = _multiply_latents(at, there, w, K_ROW, LORA, NOPE, BK)
            n = tl.arange(0, NOPE)[None, :]
            _store_parts(keys + out * NOPE + n, key * factor + nothing[:, None], behind * NOPE, PARTS)
            if head == 0:
                r = tl.arange(0, ROPE)[None, :]
                tl.store(turned + place[:, None] * ROPE + r, tl.load(rope_at + r, mask=there, other=0.0))
        else:
            w = w_uv + head.to(tl.int64) * v_head
            value, nothing = _multiply_latents(at, there, w, V_ROW, LORA, V, BK)
            value = tl.where((nothing == 0.0)[:, None], value * factor, 0.0)
            _store_parts(values + out * V + tl.arange(0, V)[None, :], value, behind * V, PARTS)
