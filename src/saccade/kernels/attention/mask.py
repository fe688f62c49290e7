"""A selection as bits, and which tiles of keys a tile of queries sees anything of.

A word of 64 bits stands for a token and a tile of 64 positions: one page. The words of neighbouring tokens lie side by
side, so that attention loads a vector of them and shifts it in registers. A word looked up for each element of a tile
makes it 3.6 times slower. Tiles that no query of a tile sees are left out: what is later than all of them, and pages
that nobody selected.

Reference: none; `read_words` is what they mean. Serves any number of tokens. Next: masked.py.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.kernels import PAGE
from saccade.kernels.types import Selection

TILES_AT_ONCE = 32  # tiles of keys that a step of the list looks at


class TileMask(NamedTuple):
    """Which positions the tokens of a step see."""

    words: Tensor  # i64 [tiles of a request, T rounded up]: bit i stands for position 64 * tile + i
    tiles: Tensor  # i32 [tiles of queries, requests * tiles + 1]: request * tiles + tile, ascending; then a 0
    counts: Tensor  # i32 [tiles of queries]: how many there are


def read_words(words: Tensor, tokens: int) -> Tensor:
    """bool [tokens, positions]."""
    bits = words[:, :tokens].t()[..., None] >> torch.arange(PAGE, device=words.device)
    return (bits & 1).bool().flatten(1)


def write_mask(
    selection: Selection, request: Tensor, positions: Tensor, pages: int, requests: int, rows: int
) -> TileMask:
    """selection: i32 [T, K], ascending, -1 at the end; `rows`: tokens of a tile of queries, a power of two."""
    t, k = selection.shape
    blocks = triton.cdiv(t, rows)
    words = torch.zeros(pages, blocks * rows, dtype=torch.int64, device=selection.device)
    _write_words[t,](
        selection, words, k, selection.stride(0), blocks * rows, SPAN=triton.next_power_of_2(k), num_warps=4
    )
    tiles = torch.empty(blocks, requests * pages + 1, dtype=torch.int32, device=selection.device)
    counts = torch.empty(blocks, dtype=torch.int32, device=selection.device)
    _list_tiles[blocks,](
        words, request, positions, tiles, counts, t, pages, requests * pages + 1, blocks * rows, BM=rows,
        EACH=TILES_AT_ONCE, PAGE=PAGE, num_warps=4,
    )  # fmt: skip
    return TileMask(words, tiles, counts)


@triton.jit
def _join(word, bits, next_word, next_bits):
    """Bits of the same word are added up: each position comes once, so that they are disjoint."""
    return next_word, next_bits + tl.where(word == next_word, bits, 0)


@triton.jit(do_not_specialize=["pitch"])
def _write_words(selection, words, k, stride, pitch, SPAN: tl.constexpr):
    """A program a token: without atomics, the last position of each word stores what the ones before have gathered."""
    token, place = tl.program_id(0).to(tl.int64), tl.arange(0, SPAN)
    chosen = selection + token * stride
    position = tl.load(chosen + place, mask=place < k, other=-1)
    following = tl.load(chosen + place + 1, mask=place + 1 < k, other=-1)
    word = position >> 6
    bits = tl.where(position >= 0, tl.full([SPAN], 1, tl.int64) << (position & 63).to(tl.int64), 0)
    _, whole = tl.associative_scan((word, bits), 0, _join)
    is_last = (position >= 0) & (word != following >> 6)
    tl.store(words + word.to(tl.int64) * pitch + token, whole, mask=is_last)


@triton.jit(do_not_specialize=["tokens", "pitch"])
def _list_tiles(
    words, request, positions, tiles, counts, tokens, pages, width, pitch, BM: tl.constexpr, EACH: tl.constexpr,
    PAGE: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    token = block * BM + tl.arange(0, BM)
    there = token < tokens
    owner = tl.load(request + token, mask=there, other=-1).to(tl.int32)
    position = tl.load(positions + token, mask=there, other=-1).to(tl.int32)
    count = 0
    out = tiles + block.to(tl.int64) * width
    for mine in range(tl.min(tl.where(there, owner, 2147483647), 0), tl.max(owner, 0) + 1):
        last = tl.max(tl.where(owner == mine, position, -1), 0)
        for start in range(0, tl.where(last >= 0, last // PAGE + 1, 0), EACH):
            tile = start + tl.arange(0, EACH)
            place = words + tile.to(tl.int64)[:, None] * pitch + token[None, :]
            word = tl.load(place, mask=(tile < pages)[:, None], other=0)
            seen = tl.max(((word != 0) & (owner == mine)[None, :]).to(tl.int32), 1)
            tl.store(out + count + tl.cumsum(seen, 0) - 1, mine * pages + tile, mask=seen > 0)
            count += tl.sum(seen, 0)
    tl.store(counts + block, count)
    tl.store(out + count, 0)
