"""Whether suspicious scales matter: a zero scale, or one far from all others, is fine over codes that are all zero.

Codes are decoded with the suspicious scales replaced by 1 and the others by 0, so whatever is not zero in the result
lies under one of them. Read are only the rows in question. Next: judge.py.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from saccade.checkpoint.index import Index
from saccade.checkpoint.read import RowRange, read_rows
from saccade.inspect.scan import Mark
from saccade.inspect.stored import Pair

PIECE = 128 << 10  # bytes of codes decoded at once: temporaries of 4 MiB


def find_used(index: Index, pair: Pair, low: float, high: float) -> dict[str, Mark]:
    """The scales that are "zero", and the positive ones outside [low, high) ("outlier"), without those over zeros
    only."""
    scale = pair.read_scale(index)
    suspects = {"zero": scale == 0, "outlier": (scale > 0) & scale.isfinite() & ((scale < low) | (scale >= high))}
    is_asked = (suspects["zero"] | suspects["outlier"]).float()
    is_used = torch.zeros(scale.shape, dtype=torch.bool)
    height, width = pair.group

    def look(_: str, codes: Tensor, first: int) -> None:
        is_nonzero = pair.decode(codes, is_asked, first) != 0  # [rows, columns]
        by_block = pad(is_nonzero, (0, -is_nonzero.shape[1] % width)).unflatten(1, (-1, width)).any(2)
        for row in range(first // height, -(-(first + len(codes)) // height)):
            inside = slice(max(row * height - first, 0), (row + 1) * height - first)
            is_used[row] |= by_block[inside].any(0)

    name, last = pair.codes.name, pair.codes.shape[0]
    rows = is_asked.any(1).nonzero().flatten().tolist()
    ranges = [RowRange(name, row * height, min((row + 1) * height, last)) for row in rows]
    read_rows(index, ranges, look, threads=1, buffer_bytes=PIECE)
    found = {}
    for sort, mask in suspects.items():
        at = (mask & is_used).flatten().nonzero()
        if len(at):
            found[sort] = Mark(len(at), int(at[0]))
    return found
