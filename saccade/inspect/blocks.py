"""Whether suspicious scales matter: a zero scale, or one far from all others, is fine over codes that are all zero.

Codes are decoded with the suspicious scales replaced by 1 and the others by 0, so whatever is not zero in the result
lies under one of them. Read are only the rows in question, and few scales at once: NVFP4 has one for 16 codes. Next:
judge.py.
"""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from saccade.checkpoint.index import Index
from saccade.checkpoint.read import RowRange, read_rows
from saccade.inspect.scan import Mark, Marks, merge
from saccade.inspect.stored import Pair
from saccade.kernels.codes import read_scale

PIECE = 128 << 10  # numbers decoded at once, if a row is not longer: temporaries of 4 MiB
SCALE_BYTES = 64 << 10  # bytes of scales looked at once: temporaries of 1 MiB


def find_used(index: Index, pair: Pair, low: float, high: float) -> Marks:
    """The scales that are "zero", and the positive ones outside [low, high) ("outlier"), without those over zeros
    only. Positions are those in the grid."""
    columns, (height, width) = pair.grid[1], pair.group
    name, last, found = pair.codes.name, pair.codes.shape[0], Marks()
    piece = PIECE if pair.coding.encoding.packed == 1 else PIECE // 2  # bytes; two 4-bit codes to one

    def look_at_scales(_: str, stored: Tensor, first: int) -> None:
        """Some rows of the grid, from `first` on."""
        scale = read_scale(stored)[:, :columns]  # a word may be filled up
        suspects = {"zero": scale == 0, "outlier": (scale > 0) & scale.isfinite() & ((scale < low) | (scale >= high))}
        is_asked = (suspects["zero"] | suspects["outlier"]).float()
        is_used = torch.zeros(scale.shape, dtype=torch.bool)

        def look_at_codes(_: str, codes: Tensor, first_row: int) -> None:
            above = first_row - first * height  # rows of this part of the grid
            is_nonzero = pair.decode(codes, is_asked, above) != 0  # [rows, columns]
            by_block = pad(is_nonzero, (0, -is_nonzero.shape[1] % width)).unflatten(1, (-1, width)).any(2)
            for row in range(above // height, -(-(above + len(codes)) // height)):
                inside = slice(max(row * height - above, 0), (row + 1) * height - above)
                is_used[row] |= by_block[inside].any(0)

        rows = (is_asked.any(1).nonzero().flatten() + first).tolist()
        ranges = [RowRange(name, row * height, min((row + 1) * height, last)) for row in rows]
        read_rows(index, ranges, look_at_codes, threads=1, buffer_bytes=piece)
        for sort, mask in suspects.items():
            at = (mask & is_used).flatten().nonzero()
            if len(at):
                merge(found, {sort: Mark(len(at), first * columns + int(at[0]))})

    stored = pair.scale._replace(shape=pair.coding.encoding.scale_shape(pair.coding.shape))
    grid = replace(index, entries={stored.name: stored})
    read_rows(grid, [RowRange(stored.name, 0, stored.shape[0])], look_at_scales, 1, SCALE_BYTES)
    return found
