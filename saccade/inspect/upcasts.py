"""The indexer's `wk` as it is stored, and what holding it in BF16 costs. One matrix at a time, 0.9 MB each.

Next: contents.py, which reports it for each layer; eval/indexers.py, which computes with these matrices.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from saccade.checkpoint.index import Index
from saccade.inspect.findings import Upcast
from saccade.inspect.stored import Pair, find_pair, is_plain, read_tensor

BYTES_PER_NUMBER = 48  # of a wk, at most in memory at once: codes, scales spread, product, upcast, error


class Stored(NamedTuple):
    """A matrix as it is in the files: codes with an f32 scale, or plain numbers."""

    data: Tensor
    scale: Tensor | None = None  # f32 [row groups, column groups]
    pair: Pair | None = None

    def exact(self) -> Tensor:
        """f32 numbers; the product of code and scale, rounded to fp32."""
        if self.scale is None or self.pair is None:
            return self.data.float()
        return self.pair.decode(self.data, self.scale)


def read_stored(index: Index, name: str) -> Stored | None:
    """A whole matrix, or None if its codes cannot be judged here."""
    entry = index.entries[name]
    if is_plain(index, entry):
        return Stored(read_tensor(index, name))
    pair = find_pair(index, entry)
    return None if pair is None else Stored(read_tensor(index, name), pair.read_scale(index), pair)


def judge_upcast(name: str, dtype: str, stored: Stored) -> Upcast | None:
    """What a `wk` loses in BF16; None if it is not finite there, which is another finding."""
    exact = stored.exact()
    held = exact.bfloat16().float()
    if not held.isfinite().all():
        return None
    rounding = float(((held - exact).abs() / exact.abs().clamp(min=torch.finfo(torch.float32).tiny)).max())
    if stored.scale is None or stored.pair is None:
        return Upcast(name, dtype, 1.0, 1.0, 1, True, rounding)
    scale = stored.scale
    mantissa, _ = torch.frexp(scale)
    return Upcast(
        name,
        stored.pair.encoding,
        float(scale.min()),
        float(scale.max()),
        len(scale[0].unique()),
        bool((mantissa == 0.5).all()),
        rounding,
    )
