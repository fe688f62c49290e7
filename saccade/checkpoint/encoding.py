"""How numbers are stored in a checkpoint: plain, or as codes that mean nothing without their scale.

Descriptors only: no torch, no bytes. A row of ENCODINGS says which dtype the codes have, how the scale is called, and
how many rows and columns share one. The file decides: `find_encoding` looks at dtypes and names in the headers, never
at `modules_to_not_convert` and its like, which in the wild name tensors that do not exist. A new format is a new row.
Who multiplies is kernels/reference.py:dequantize, and nobody else.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from saccade.checkpoint.index import Entry
from saccade.errors import Problem

Shape = tuple[int, ...]

PLAIN = frozenset({"BF16", "F16", "F32"})


@dataclass(frozen=True, eq=False)  # each row is itself: compared and hashed 46,000 times a plan
class Encoding:
    """Codes of `codes` dtype in a tensor T, scales in the tensor T + `suffix`; value = code * scale."""

    name: str
    codes: str
    suffix: str
    scale_dtypes: tuple[str, ...]
    group: tuple[int, int]  # rows and columns that share one scale, a property of the format, never of a division

    def scale_shape(self, shape: Shape) -> Shape:
        """Shape of the scale of a [rows, columns] tensor: a ragged edge has a scale of its own (576 rows: 5)."""
        return tuple(-(-n // g) for n, g in zip(shape, self.group, strict=True))


ENCODINGS = (
    # DeepSeek-V3.2 and GLM-5-FP8. GLM and DeepSeek hold powers of two in F32; E8M0 is the same in one byte.
    Encoding("FP8 128x128", "F8_E4M3", "_scale_inv", ("F32", "F8_E8M0"), (128, 128)),
)

SUFFIXES = tuple({e.suffix: None for e in ENCODINGS})
SUPPORTED = ", ".join((*sorted(PLAIN), *(e.name for e in ENCODINGS)))


def find_encoding(entry: Entry, entries: Mapping[str, Entry]) -> Encoding | Problem | None:
    """How `entry` is stored: None for plain numbers, its row of the table, or why there is none."""
    if entry.dtype in PLAIN:
        return None
    found = []
    for encoding in ENCODINGS:
        if encoding.codes == entry.dtype:
            scale = entries.get(entry.name + encoding.suffix)
            if scale is not None:
                if _belong_together(encoding, entry.shape, scale.dtype, scale.shape):
                    return encoding
                found.append((encoding, scale))
    return _explain(entry, found)


@lru_cache(maxsize=1024)  # 46,000 matrices of DeepSeek-V3.2 have 12 shapes
def _belong_together(encoding: Encoding, shape: Shape, scale_dtype: str, scale_shape: Shape) -> bool:
    return len(shape) == 2 and scale_dtype in encoding.scale_dtypes and scale_shape == encoding.scale_shape(shape)


def _explain(entry: Entry, found: list[tuple[Encoding, Entry]]) -> Problem:
    """Why codes cannot be read: no such format, no scale, or a scale that does not fit."""
    rows = [e for e in ENCODINGS if e.codes == entry.dtype]
    if not rows:
        return Problem("dtype", entry.name, f"is stored as {entry.dtype}, which is no known format ({SUPPORTED})")
    if not found:
        names = " or ".join(entry.name.rsplit(".", 1)[-1] + e.suffix for e in rows)
        return Problem(
            "missing-scale",
            entry.name,
            f"holds {entry.dtype} codes, but its scale ({names}) is not in the checkpoint;"
            " without it they mean nothing: get the shard that has it",
        )
    if len(entry.shape) != 2:
        return Problem("shape", entry.name, f"holds {entry.dtype} codes and has shape {entry.shape}, expected 2 axes")
    encoding, scale = found[0]
    wanted = f"{' or '.join(encoding.scale_dtypes)} {list(encoding.scale_shape(entry.shape))}"
    text = f"is {scale.dtype} {list(scale.shape)}; {encoding.name} codes of shape {list(entry.shape)} need {wanted}"
    return Problem("scale", scale.name, text)


def weight_of(name: str) -> str | None:
    """The tensor whose scale `name` would be by its name, or None if it is not named like a scale."""
    for suffix in SUFFIXES:
        if name.endswith(suffix):
            return name.removesuffix(suffix)
    return None
