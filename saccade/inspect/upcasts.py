"""The indexer's `wk` as it is stored, and what holding it in BF16 costs. One matrix at a time, 0.9 MB each.

Decodes with the one `dequantize`. Next: contents.py, which reports it for each layer; eval/indexers.py, which computes
with these matrices.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from saccade.checkpoint.encoding import Encoding, find_encoding
from saccade.checkpoint.index import Entry, Index
from saccade.checkpoint.read import RowRange, read_rows
from saccade.inspect.findings import Upcast
from saccade.kernels.reference import dequantize

BYTES_PER_NUMBER = 48  # of a wk, at most in memory at once: codes, scales spread, product, upcast, error
PAIRED = {"F8_E4M3", "F8_E5M2", "I8"}  # one code is one number, and a 2-D scale goes with it


class Stored(NamedTuple):
    """A matrix as it is in the files."""

    data: Tensor  # codes, or plain numbers
    scale: Tensor | None  # f32 [row groups, column groups]
    encoding: Encoding | None

    def exact(self) -> Tensor:
        """f32 numbers; the product of code and scale, rounded to fp32."""
        if self.scale is None or self.encoding is None:
            return self.data.float()
        return dequantize(self.data, self.scale, self.encoding.group)


def scale_entry(index: Index, entry: Entry) -> tuple[Encoding, Entry] | None:
    """The encoding and the scale of codes that `dequantize` can decode by themselves, or None."""
    encoding = find_encoding(entry, index.entries)
    if not isinstance(encoding, Encoding) or entry.dtype not in PAIRED:
        return None
    scale = index.entries.get(entry.name + encoding.suffix)
    return None if scale is None or len(scale.shape) != 2 else (encoding, scale)


def read_stored(index: Index, name: str) -> Stored | None:
    """A whole matrix, or None if its codes cannot be judged here."""
    entry = index.entries[name]
    if find_encoding(entry, index.entries) is None:
        return Stored(read_tensor(index, name), None, None)
    found = scale_entry(index, entry)
    if found is None:
        return None
    encoding, scale = found
    return Stored(read_tensor(index, name), read_tensor(index, scale.name).float(), encoding)


def judge_upcast(name: str, dtype: str, stored: Stored) -> Upcast | None:
    """What a `wk` loses in BF16; None if it is not finite there, which is another finding."""
    exact = stored.exact()
    if not exact.bfloat16().isfinite().all():
        return None
    rounding = _rounding(exact)
    if stored.scale is None or stored.encoding is None:
        return Upcast(name, dtype, 1.0, 1.0, 1, True, rounding)
    scale = stored.scale
    mantissa, _ = torch.frexp(scale)
    return Upcast(
        name,
        stored.encoding.name,
        float(scale.min()),
        float(scale.max()),
        len(scale[0].unique()),
        bool((mantissa == 0.5).all()),
        rounding,
    )


def read_tensor(index: Index, name: str) -> Tensor:
    """One whole tensor, as it is stored."""
    pieces: list[tuple[int, Tensor]] = []

    def keep(_: str, rows: Tensor, first_row: int) -> None:
        pieces.append((first_row, rows.clone()))

    shape = index.entries[name].shape
    read_rows(index, [RowRange(name, 0, shape[0] if shape else 1)], keep, threads=1)
    return torch.cat([rows for _, rows in sorted(pieces, key=lambda piece: piece[0])])


def _rounding(exact: Tensor) -> float:
    error = (exact.bfloat16().float() - exact).abs()
    return float((error / exact.abs().clamp(min=torch.finfo(torch.float32).tiny)).max())
