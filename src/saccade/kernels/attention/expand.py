"""Keys and values of each head, made from the latents of a context: what un-absorbed attention multiplies.

For 8,192 positions and 16 heads that is 34 GFLOP and 67 MB written, in BF16; 134 MB as two BF16 numbers each, which
keep 16 bits. Latents are read page by page, where they lie.

A row that is not finite gets a key that is no number and a value of zeros: who sees it gets no number, and who does not
is spared it (no weight times a NaN is a NaN).

Reference: `linear` in reference.py. Serves latents, w_uk and w_uv in BF16. Next: masked.py.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from saccade.kernels import PAGE
from saccade.kernels.activations import dot, split_in_two

LATENT_COLUMNS = 64  # in a step


class Expanded(NamedTuple):
    """Of the requests of a step one after the other, `pages` pages each, behind one another for each head and part."""

    keys: Tensor  # bf16 [parts * heads * rows, nope]
    rope: Tensor  # bf16 [rows, rope]: of all heads
    values: Tensor  # bf16 [parts * heads * rows, v]


def count_expanded_bytes(rows: int, heads: int, nope: int, v: int, parts: int) -> int:
    """Bytes of `Expanded`, but for the rope, which is there anyway."""
    return rows * heads * (nope + v) * parts * 2


def expand_latents(
    latent: Tensor, page_table: Tensor, lengths: Tensor, w_uk: Tensor, w_uv: Tensor, parts: int
) -> Expanded:
    """latent: the pool [rows, kv_lora + rope]; page_table: [R, P]; lengths: [R] tokens in the cache; w_uk: [heads,
    nope, kv_lora] and w_uv: [heads, v, kv_lora], of the heads that are wanted. Rows behind a length are zeros in its
    last page, and unwritten beyond."""
    (heads, nope, lora), v, (requests, pages) = w_uk.shape, w_uv.shape[1], page_table.shape
    rows, rope = requests * pages * PAGE, latent.shape[1] - lora
    keys, values = (latent.new_empty(parts * heads * rows, width) for width in (nope, v))
    turned = latent.new_empty(rows, rope)
    _expand[requests * pages, heads](
        latent, page_table, lengths, w_uk, w_uv, keys, turned, values, pages, page_table.stride(0), w_uk.stride(0),
        w_uv.stride(0), rows, heads * rows, LORA=lora, NOPE=nope, ROPE=rope, V=v, K_ROW=w_uk.stride(1),
        V_ROW=w_uv.stride(1), PARTS=parts, PAGE=PAGE, BK=min(LATENT_COLUMNS, lora), num_warps=4, num_stages=3,
    )  # fmt: skip
    return Expanded(keys, turned, values)


@triton.jit
def _store_parts(at, x, behind, PARTS: tl.constexpr):
    high, low = split_in_two(x, tl.bfloat16)
    tl.store(at, high)
    if PARTS > 1:
        tl.store(at + behind, low)


@triton.jit(do_not_specialize=["pages", "table_stride", "rows", "span"])
def _expand(
    latent, page_table, lengths, w_uk, w_uv, keys, turned, values, pages, table_stride, k_head, v_head, rows, span,
    LORA: tl.constexpr, NOPE: tl.constexpr, ROPE: tl.constexpr, V: tl.constexpr, K_ROW: tl.constexpr,
    V_ROW: tl.constexpr, PARTS: tl.constexpr, PAGE: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A program a page and head."""
    request, page, head = tl.program_id(0) // pages, tl.program_id(0) % pages, tl.program_id(1)
    length = tl.load(lengths + request).to(tl.int32)
    if page * PAGE < length:
        offset, column = tl.arange(0, PAGE), tl.arange(0, BK)
        there = (page * PAGE + offset < length)[:, None]
        row = tl.load(page_table + request * table_stride + page).to(tl.int64) * PAGE + offset
        at = latent + row[:, None] * (LORA + ROPE)
        n, m = tl.arange(0, NOPE), tl.arange(0, V)
        w_uk += head.to(tl.int64) * k_head
        w_uv += head.to(tl.int64) * v_head
        key, value = tl.zeros([PAGE, NOPE], tl.float32), tl.zeros([PAGE, V], tl.float32)
        nothing = tl.zeros([PAGE], tl.float32)  # or no number
        for start in range(0, LORA, BK):
            x = tl.load(at + start + column[None, :], mask=there, other=0.0)
            key = dot(x, tl.load(w_uk + n[None, :] * K_ROW + start + column[:, None]), key)
            value = dot(x, tl.load(w_uv + m[None, :] * V_ROW + start + column[:, None]), value)
            nothing += tl.sum(x.to(tl.float32) * 0.0, 1)
        value = tl.where((nothing == 0.0)[:, None], value, 0.0)
        place = tl.program_id(0).to(tl.int64) * PAGE + offset
        out = head.to(tl.int64) * rows + place
        behind = span.to(tl.int64)
        _store_parts(keys + out[:, None] * NOPE + n[None, :], key + nothing[:, None], behind * NOPE, PARTS)
        _store_parts(values + out[:, None] * V + m[None, :], value, behind * V, PARTS)
        if head == 0:
            r = tl.arange(0, ROPE)[None, :]
            tl.store(turned + place[:, None] * ROPE + r, tl.load(at + LORA + r, mask=there, other=0.0))
