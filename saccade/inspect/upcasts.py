"""The indexer's `wk` as it is stored, and what holding it in BF16 costs. One matrix at a time, 0.9 MB each.

Next: contents.py, which reports it for each layer; eval/indexers.py, which computes with these matrices.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from saccade.checkpoint.index import Index
from saccade.inspect.findings import Upcast
from saccade.inspect.stored import Pair, find_pair, is_plain, read_tensor

BYTES_PER_NUMBER = 8  # of a wk, in memory at once: as stored, and again while its pieces are joined
ROWS = 16  # decoded at once: temporaries of 3 MB at 7,168 columns


class Stored(NamedTuple):
    """A matrix as it is in the files: codes with an f32 scale, or plain numbers."""

    data: Tensor
    scale: Tensor | None = None  # f32 [row groups, column groups]
    pair: Pair | None = None

    def exact(self) -> Iterator[Tensor]:
        """f32 numbers, some rows at a time; the product of code and scale, rounded to fp32."""
        for first, rows in enumerate(self.data.split(ROWS)):
            if self.scale is None or self.pair is None:
                yield rows.float()
            else:
                yield self.pair.decode(rows, self.scale, first * ROWS)


def read_stored(index: Index, name: str) -> Stored | None:
    """A whole matrix, or None if its codes cannot be judged here."""
    entry = index.entries[name]
    if is_plain(index, entry):
        return Stored(read_tensor(index, name))
    pair = find_pair(index, entry)
    return None if pair is None else Stored(read_tensor(index, name), pair.read_scale(index), pair)


def judge_upcast(name: str, dtype: str, stored: Stored) -> Upcast | None:
    """What a `wk` loses in BF16; None if it is not finite there, which is another finding."""
    rounding, least = 0.0, torch.finfo(torch.float32).tiny
    for exact in stored.exact():
        held = exact.bfloat16().float()
        if not held.isfinite().all():
            return None
        rounding = max(rounding, float(((held - exact).abs() / exact.abs().clamp(min=least)).max()))
    if stored.scale is None or stored.pair is None:
        return Upcast(name, dtype, None, None, 0, 0, False, rounding)
    scale = stored.scale
    mantissa, _ = torch.frexp(scale)
    return Upcast(
        name,
        stored.pair.encoding,
        float(scale.min()),
        float(scale.max()),
        scale.shape[-1],
        len(scale.unique()),
        bool((mantissa == 0.5).all()),
        rounding,
    )
