"""How matrices are stored, as far as this package has to know: codes, their scale, and how to decode the two.

The one file here that knows the table of encodings. A pair is codes of one number each with a grid of scales; other
encodings are not judged by their codes, and are named. Decodes with the one `dequantize`. Next: upcasts.py, blocks.py.
"""

from typing import NamedTuple

from torch import Tensor

from saccade.checkpoint import coding
from saccade.checkpoint.coding import Coding, find_coding
from saccade.checkpoint.encoding import UNUSED, weight_of
from saccade.checkpoint.index import Entry, Index
from saccade.checkpoint.read import read_tensors
from saccade.decode import matrix_of
from saccade.kernels import codes as numbers
from saccade.kernels.matrix import Matrix
from saccade.kernels.reference import dequantize


class Pair(NamedTuple):
    """Codes [rows, columns], one number each, and their scale."""

    coding: Coding
    codes: Entry
    scale: Entry
    group: tuple[int, int]  # rows and columns that share a scale, at most all

    @property
    def encoding(self) -> str:
        return self.coding.encoding.name

    @property
    def grid(self) -> tuple[int, int]:
        """How many scales there are along either axis, however the file writes their shape."""
        (rows, columns), (height, width) = self.codes.shape, self.group
        return -(-rows // height), -(-columns // width)

    def read_scale(self, index: Index) -> Tensor:
        """f32 [grid]"""
        return numbers.read_scale(read_tensor(index, self.scale.name)).view(self.grid)

    def decode(self, codes: Tensor, scale: Tensor, first_row: int = 0) -> Tensor:
        """f32 numbers of some rows of the codes, with the whole scale."""
        return dequantize(codes, scale, self.group, (first_row, 0), self.coding.encoding.code)


def find_pair(index: Index, entry: Entry | None) -> Pair | None:
    """The pair whose codes, or whose scale, a tensor is; None if it is in none that can be decoded here."""
    if entry is None:
        return None
    found = find_coding(weight_of(entry.name) or entry.name, index.entries)
    if not isinstance(found, Coding) or found.global_scale is not None:
        return None
    if found.encoding.packed > 1 or found.encoding.scales_packed > 1:
        return None
    codes, scale = index.entries[found.codes], index.entries[found.scale]
    if entry not in (codes, scale) or 0 in codes.shape:
        return None
    height, width = (min(g, n) for g, n in zip(found.encoding.group, codes.shape, strict=True))
    return Pair(found, codes, scale, (height, width))


def find_codes(index: Index, scale: Entry) -> Entry | None:
    """The tensor that a scale belongs to by its name, whether or not it can be decoded here."""
    if scale.name.rpartition(".")[2] in UNUSED:
        return None
    return coding.find_codes(weight_of(scale.name) or "", index.entries)


def is_global(index: Index, scale: Entry) -> bool:
    """Whether a tensor is the one scale of a whole matrix, beside those of its groups."""
    found = find_coding(weight_of(scale.name) or "", index.entries)
    return isinstance(found, Coding) and found.global_scale == scale.name


def name_encoding(index: Index, entry: Entry) -> str:
    """`FP8 128x128`, or the dtype of what is in no row of the table."""
    found = find_coding(weight_of(entry.name) or entry.name, index.entries)
    return found.encoding.name if isinstance(found, Coding) else entry.dtype


def read_matrix(index: Index, name: str) -> tuple[Matrix, str] | None:
    """The matrix `name` as it is stored, whatever the encoding, and what that is called; None if it cannot be read."""
    found = find_coding(name, index.entries)
    if found is None:
        return Matrix(read_tensor(index, name)), index.entries[name].dtype
    if not isinstance(found, Coding):
        return None
    tensors = read_tensors(index, (found.codes, *found.partners))
    return matrix_of(found, tensors[found.codes], [tensors[name] for name in found.partners]), found.encoding.name


def read_tensor(index: Index, name: str) -> Tensor:
    """One whole tensor, as it is stored."""
    return read_tensors(index, [name])[name]
