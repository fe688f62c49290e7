"""How matrices are stored, as far as this package has to know: codes, their scale, and how to decode the two.

The one file here that knows the table of encodings. A pair is codes of one number each with a grid of scales; other
encodings are not judged by their codes, and are named. Decodes with the one `dequantize`. Next: upcasts.py, blocks.py.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from saccade.checkpoint.encoding import Encoding, find_encoding, weight_of
from saccade.checkpoint.index import Entry, Index
from saccade.checkpoint.read import RowRange, read_rows
from saccade.kernels.reference import dequantize

DECODED = {"F8_E4M3", "F8_E5M2", "I8"}  # one code is one number


class Pair(NamedTuple):
    """Codes [rows, columns] and their scale."""

    encoding: str
    codes: Entry
    scale: Entry
    group: tuple[int, int]  # rows and columns that share a scale, at most all

    @property
    def grid(self) -> tuple[int, int]:
        """How many scales there are along either axis, however the file writes their shape."""
        (rows, columns), (height, width) = self.codes.shape, self.group
        return -(-rows // height), -(-columns // width)

    def read_scale(self, index: Index) -> Tensor:
        """f32 [grid]"""
        stored = read_tensor(index, self.scale.name)
        if self.scale.dtype == "U8":  # E8M0 by another name
            stored = stored.view(torch.float8_e8m0fnu)
        return stored.float().view(self.grid)

    def decode(self, codes: Tensor, scale: Tensor, first_row: int = 0) -> Tensor:
        """f32 numbers of some rows of the codes, with the whole scale."""
        return dequantize(codes, scale, self.group, origin=(first_row, 0))


def find_pair(index: Index, entry: Entry | None) -> Pair | None:
    """The pair whose codes, or whose scale, a tensor is; None if it is in none that can be decoded here."""
    if entry is None:
        return None
    codes = index.entries.get(weight_of(entry.name) or entry.name, entry)
    encoding = find_encoding(codes, index.entries)
    if not isinstance(encoding, Encoding) or codes.dtype not in DECODED or len(codes.shape) != 2:
        return None
    scale = index.entries.get(codes.name + encoding.suffix)
    if scale is None or entry not in (codes, scale) or 0 in codes.shape:
        return None
    height, width = (min(g, n) for g, n in zip(encoding.group, codes.shape, strict=True))
    return Pair(encoding.name, codes, scale, (height, width))


def find_codes(index: Index, scale: Entry) -> Entry | None:
    """The tensor that a scale belongs to by its name, whether or not it can be decoded here."""
    return index.entries.get(weight_of(scale.name) or "")


def name_encoding(index: Index, entry: Entry) -> str:
    """`FP8 128x128`, or the dtype of what is in no row of the table."""
    encoding = find_encoding(entry, index.entries)
    return encoding.name if isinstance(encoding, Encoding) else entry.dtype


def is_plain(index: Index, entry: Entry) -> bool:
    return find_encoding(entry, index.entries) is None


def read_tensor(index: Index, name: str) -> Tensor:
    """One whole tensor, as it is stored."""
    pieces: list[tuple[int, Tensor]] = []

    def keep(_: str, rows: Tensor, first_row: int) -> None:
        pieces.append((first_row, rows.clone()))

    shape = index.entries[name].shape
    read_rows(index, [RowRange(name, 0, shape[0] if shape else 1)], keep, threads=1)
    return torch.cat([rows for _, rows in sorted(pieces, key=lambda p: p[0])]) if shape else pieces[0][1]
