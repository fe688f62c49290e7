"""How matrices are stored, as far as this package has to know: codes, their scales, and how to decode the two.

The one file here that knows the table of encodings; what is in no row of it is named, not judged. Decodes with the one
`dequantize`. Next: upcasts.py, blocks.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from saccade.checkpoint.coding import Coding, find_codes, find_coding
from saccade.checkpoint.encoding import ENCODINGS, OFFSET, SCALE_LEAVES, ZERO_POINT, Shape, weight_of
from saccade.checkpoint.index import Entry, Index
from saccade.checkpoint.leftovers import SCALE_LEAF_NAMES
from saccade.checkpoint.read import read_tensors
from saccade.config.file import Config
from saccade.errors import Problem
from saccade.kernels.reference import decode
from saccade.kernels.types import Matrix
from saccade.plan import find_leftovers, find_shapes
from saccade.weights.dequantize import matrix_of

PACKED_IN = frozenset(e.codes for e in ENCODINGS if e.packed > 1)  # dtypes of 4-bit codes


class Pair(NamedTuple):
    """Codes and the scales of their groups; a global scale, which scales every code alike, is not one of them."""

    coding: Coding
    codes: Entry
    scale: Entry

    @property
    def group(self) -> tuple[int, int]:
        """Rows and columns that share a scale, at most all."""
        height, width = (min(g, n) for g, n in zip(self.coding.encoding.group, self.coding.shape, strict=True))
        return height, width

    @property
    def grid(self) -> tuple[int, int]:
        """How many scales there are along either axis, however the file writes their shape."""
        return self.coding.encoding.grid(self.coding.shape)

    def decode(self, codes: Tensor, scale: Tensor, first_row: int, second: Tensor | None = None) -> Tensor:
        """f32 numbers of some rows of the codes, with f32 scales [rows of the grid, columns] in place of the file's,
        and a global scale [1, 1] if it is given. Rows are counted from the first that these scales are for."""
        e = self.coding.encoding
        matrix = Matrix(codes, scale, e.group, e.code, second, e.divides)
        return decode(matrix, (first_row, 0))[:, : self.coding.shape[1]]


@dataclass(frozen=True)
class Codings:
    """How the tensors of a checkpoint are stored: looked up by any of them, codes or what stands beside codes."""

    index: Index
    shapes: Mapping[str, Shape]  # of matrices, where the config says them
    leftovers: frozenset[str]  # tensors that quantisers left and nothing here reads

    @classmethod
    def of(cls, config: Config, index: Index) -> "Codings":
        return cls(index, find_shapes(config, index), frozenset(find_leftovers(config, index)))

    def find(self, entry: Entry) -> Coding | Problem | None:
        """That of the matrix to which a tensor belongs; None for plain numbers."""
        return self.find_matrix(weight_of(entry.name) or entry.name)

    def find_matrix(self, name: str) -> Coding | Problem | None:
        return find_coding(name, self.index.entries, self.shapes.get(name))

    def find_pair(self, entry: Entry) -> Pair | None:
        """The pair whose codes, or whose scale, a tensor is; None if it is in none that the table knows."""
        found = self.find(entry)
        if not isinstance(found, Coding) or entry.name not in (found.codes, found.scale) or 0 in found.shape:
            return None
        return Pair(found, self.index.entries[found.codes], self.index.entries[found.scale])

    def find_scaled(self, scale: Entry) -> Entry | None:
        """The tensor that a scale belongs to by its name, whether or not it can be decoded here."""
        if self.is_unused(scale):
            return None
        return find_codes(weight_of(scale.name) or "", self.index.entries)

    def find_exponents(self, entry: Entry) -> tuple[int, int] | None:
        """How many scales, along either axis, a tensor holds that packs several exponents into a word; None if it does
        not. The last word of a row may hold more: it is filled up."""
        pair = self.find_pair(entry) if entry.dtype == "I32" and is_scale(entry) else None
        return pair.grid if pair is not None and pair.coding.encoding.scales_packed > 1 else None

    def find_nibbles(self, entry: Entry) -> str | None:
        """How the 4-bit codes that a tensor holds are spelled ("e2m1", "int4", "uint4"); None if it holds none."""
        pair = self.find_pair(entry) if entry.dtype in PACKED_IN and not is_scale(entry) else None
        return pair.coding.encoding.code if pair is not None and pair.coding.encoding.packed > 1 else None

    def is_offset(self, entry: Entry) -> bool:
        """Whether a tensor is added to codes, which are read only if it is zero."""
        found = self.find(entry) if entry.name.endswith((OFFSET, ZERO_POINT)) else None
        return isinstance(found, Coding) and found.offset == entry.name

    def is_unused(self, entry: Entry) -> bool:
        """Whether a tensor belongs to something that is not quantised here: activations, or the cache."""
        return entry.name in self.leftovers or leaf_of(entry) in SCALE_LEAF_NAMES

    def is_global(self, scale: Entry) -> bool:
        """Whether a tensor is the one scale of a whole matrix, beside those of its groups."""
        found = self.find(scale)
        return isinstance(found, Coding) and found.global_scale == scale.name

    def name_of(self, entry: Entry) -> str:
        """`FP8 128x128`, or the dtype of what is in no row of the table."""
        found = self.find(entry)
        return found.encoding.name if isinstance(found, Coding) else entry.dtype

    def read_matrix(self, name: str) -> tuple[Matrix, str] | None:
        """The matrix `name` as it is stored, whatever the encoding, and what that is called; None if it cannot be
        read."""
        found = self.find_matrix(name)
        if found is None:
            return Matrix(read_tensor(self.index, name)), self.index.entries[name].dtype
        if not isinstance(found, Coding):
            return None
        tensors = read_tensors(self.index, (found.codes, *found.partners))
        return matrix_of(found, tensors[found.codes], [tensors[name] for name in found.partners]), found.encoding.name


def is_scale(entry: Entry) -> bool:
    """Whether a tensor is a scale, which its name says: weight_scale_inv, weight_scale_2, input_scale."""
    return leaf_of(entry) in SCALE_LEAVES or leaf_of(entry) in SCALE_LEAF_NAMES


def leaf_of(entry: Entry) -> str:
    return entry.name.rpartition(".")[2]


def read_tensor(index: Index, name: str) -> Tensor:
    """One whole tensor, as it is stored."""
    return read_tensors(index, [name])[name]
