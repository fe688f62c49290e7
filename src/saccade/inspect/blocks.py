"""Whether suspicious scales matter. A zero scale, or one far from all others, does no harm over codes that are all
zero. A huge scale does none over small codes.

Codes are decoded with 1, or with the scale itself, for suspicious scales and with 0 for the others, so whatever is not
zero, or not finite, in the result lies under one of them. Read are only the rows in question, and few scales at once:
NVFP4 has one for 16 codes. Next: judge.py.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from saccade.checkpoint.index import Index
from saccade.checkpoint.read import RowRange, read_rows
from saccade.checkpoint.write import BF16_REACH
from saccade.inspect.scan import Mark, Marks, merge_marks
from saccade.inspect.stored import Pair
from saccade.kernels.codes import NIBBLES, read_scale

DECODED_AT_ONCE = 128 << 10  # numbers decoded at once, if a row is not longer: temporaries of 4 MiB
SCALE_PIECE = 64 << 10  # bytes of scales looked at once: temporaries of 1 MiB
LARGEST_CODE = {"e4m3": 448.0, "int8": 128.0} | {code: max(map(abs, values)) for code, values in NIBBLES.items()}


def find_used(index: Index, pair: Pair, low: float, high: float) -> Marks:
    """The scales that are "zero", and the positive ones outside [low, high) ("outlier"), without those over zeros
    only. Positions are those in the grid."""

    def suspect(scale: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        is_far = (scale > 0) & scale.isfinite() & ((scale < low) | (scale >= high))
        return {"zero": scale == 0, "outlier": is_far}, ((scale == 0) | is_far).float()

    return _find(index, pair, suspect, lambda codes, scale, row: pair.decode(codes, scale, row) != 0)


def find_beyond(index: Index, pair: Pair, second: Tensor | None) -> Mark | None:
    """The scales that take a code beyond the range of BF16. `second`: f32 [1, 1], the global scale if there is one."""
    e = pair.coding.encoding
    factor = 1.0 if second is None else 1 / float(second) if e.divides else float(second)
    safe = min(BF16_REACH / 2 / factor / LARGEST_CODE[e.code], BF16_REACH)  # no code is taken beyond by a smaller scale

    def suspect(scale: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        is_large = (scale > safe) & scale.isfinite()
        return {"beyond": is_large}, scale.where(is_large, 0)

    def is_beyond(codes: Tensor, scale: Tensor, row: int) -> Tensor:
        return pair.decode(codes, scale, row, second).bfloat16().isinf()

    return _find(index, pair, suspect, is_beyond).get("beyond")


def _find(
    index: Index,
    pair: Pair,
    suspect: Callable[[Tensor], tuple[Mapping[str, Tensor], Tensor]],
    is_hit: Callable[[Tensor, Tensor, int], Tensor],
) -> Marks:
    """The suspicious scales, by sort, over a number that is a hit. `suspect`: of f32 scales the masks by sort, and what
    to decode with. `is_hit`: of some rows of codes, such scales and the codes' first row, counted from the scales'."""
    columns, (height, width) = pair.grid[1], pair.group
    name, last, found = pair.codes.name, pair.codes.shape[0], Marks()
    piece = (
        DECODED_AT_ONCE if pair.coding.encoding.packed == 1 else DECODED_AT_ONCE // 2
    )  # bytes; two 4-bit codes to one

    def look_at_scales(_: str, stored: Tensor, first: int) -> None:
        """Some rows of the grid, from `first` on."""
        scale = read_scale(stored)[:, :columns]  # a word may be filled up
        suspects, asked = suspect(scale)
        is_used = torch.zeros(scale.shape, dtype=torch.bool)

        def look_at_codes(_: str, codes: Tensor, first_row: int) -> None:
            above = first_row - first * height  # rows of this part of the grid
            hits = is_hit(codes, asked, above)  # [rows, columns]
            by_block = pad(hits, (0, -hits.shape[1] % width)).unflatten(1, (-1, width)).any(2)
            for row in range(above // height, -(-(above + len(codes)) // height)):
                inside = slice(max(row * height - above, 0), (row + 1) * height - above)
                is_used[row] |= by_block[inside].any(0)

        rows = ((asked != 0).any(1).nonzero().flatten() + first).tolist()
        ranges = [RowRange(name, row * height, min((row + 1) * height, last)) for row in rows]
        read_rows(index, ranges, look_at_codes, threads=1, buffer_bytes=piece)
        for sort, mask in suspects.items():
            at = (mask & is_used).flatten().nonzero()
            if len(at):
                merge_marks(found, {sort: Mark(len(at), first * columns + int(at[0]))})

    stored = pair.scale._replace(shape=pair.coding.encoding.scale_shape(pair.coding.shape))
    grid = replace(index, entries={stored.name: stored})
    read_rows(grid, [RowRange(stored.name, 0, stored.shape[0])], look_at_scales, 1, SCALE_PIECE)
    return found
