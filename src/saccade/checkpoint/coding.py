"""Which row of the table of encodings a matrix fits, and the tensors that it is made of; or why it cannot be read.

The file decides: dtypes, names and shapes in the headers, never `modules_to_not_convert` and its like, which in the
wild name tensors that do not exist. A refusal names the tensor, what was found and what is supported. No torch, no
bytes. Next: plan/lower.py asks for every part of every parameter.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

from saccade.checkpoint.encoding import (
    CODE_SUFFIXES,
    ENCODINGS,
    FOREIGN,
    OFFSET,
    PLAIN,
    REORDER,
    SCALE_SUFFIXES,
    SIGNED,
    ZERO_POINT,
    Encoding,
    Shape,
    weight_of,
)
from saccade.checkpoint.index import Entry
from saccade.errors import Problem

SUPPORTED = ", ".join((*sorted(PLAIN), *(e.name for e in ENCODINGS)))


class Coding(NamedTuple):
    """One matrix that is stored as codes: its row of the table, and the tensors that it is made of."""

    encoding: Encoding
    shape: Shape  # of the matrix
    codes: str
    scale: str
    global_scale: str | None = None
    offset: str | None = None  # must hold zeros: the codes are symmetric

    @property
    def partners(self) -> tuple[str, ...]:
        """What the codes are multiplied by."""
        return (self.scale,) if self.global_scale is None else (self.scale, self.global_scale)


def find_coding(name: str, entries: Mapping[str, Entry], shape: Shape | None = None) -> Coding | Problem | None:
    """How the matrix `name`, of the given shape, is stored: None for plain numbers, its codes and their partners, or
    why it cannot be read. Without `shape` the codes say how many columns there are."""
    codes = find_codes(name, entries)
    if codes is None:
        return explain_missing_tensor(name, entries, shape)
    if codes.dtype in PLAIN and codes.name == name:
        return None
    code_suffix = codes.name[len(name) :]
    for scale_suffix in SCALE_SUFFIXES:
        scale = entries.get(name + scale_suffix)
        if scale is not None:
            found = _match(codes.dtype, code_suffix, codes.shape, scale_suffix, scale.dtype, scale.shape, shape)
            if found is not None:
                encoding, seen = found
                if encoding.code == "e4m3" and name + ZERO_POINT not in entries:
                    return Coding(encoding, seen, codes.name, scale.name)
                return _find_rest(Coding(encoding, seen, codes.name, scale.name), name, entries)
    return explain_codes(name, codes, entries, shape)


def find_encoding(entry: Entry, entries: Mapping[str, Entry]) -> Encoding | Problem | None:
    """The row of the table for `entry`, a tensor of codes, by the headers alone: None for plain numbers."""
    coding = find_coding(weight_of(entry.name) or entry.name, entries)
    return coding.encoding if isinstance(coding, Coding) else coding


def find_codes(name: str, entries: Mapping[str, Entry]) -> Entry | None:
    """The tensor that holds the numbers or codes of the matrix `name`."""
    for suffix in CODE_SUFFIXES:
        entry = entries.get(name + suffix)
        if entry is not None:
            return entry
    return None


def _find_rest(coding: Coding, name: str, entries: Mapping[str, Entry]) -> Coding | Problem:
    """What integer and 4-bit codes have besides a scale."""
    if name + REORDER in entries:
        return _refuse_beside(coding, name + REORDER)
    global_suffix = coding.encoding.global_suffix
    if global_suffix is not None:
        second = entries.get(name + global_suffix)
        if second is None:
            leaf = name.rpartition(".")[2] + global_suffix
            text = f"holds {coding.encoding.name} codes, but its global scale ({leaf}) is not in the checkpoint"
            return Problem("missing-scale", name, f"{text}; without it they mean nothing: get the shard that has it")
        if second.dtype != "F32" or second.shape not in ((), (1,)):
            text = f"is {second.dtype} {list(second.shape)}; a global scale is F32 [] or [1]"
            return Problem("scale", second.name, text)
        coding = coding._replace(global_scale=second.name)
    return _find_offset(coding, name, entries)


def _find_offset(coding: Coding, name: str, entries: Mapping[str, Entry]) -> Coding | Problem:
    """A zero point is read as an offset is, and must hold zeros, if its numbers are signed and there is one for each
    scale. In unsigned or packed numbers (I32 [rows / 8, groups]) zero is spelled in other ways, and it is refused."""
    offset, point = name + OFFSET, entries.get(name + ZERO_POINT)
    if offset not in entries:
        if point is None:
            return coding
        if point.dtype in SIGNED and point.shape in coding.encoding.scale_shapes(coding.shape):
            return coding._replace(offset=point.name)
    return coding._replace(offset=offset) if point is None else _refuse_beside(coding, point.name)


def _refuse_beside(coding: Coding, name: str) -> Problem:
    return Problem("encoding", name, f"stands beside {coding.encoding.name} codes, which are supported only without it")


@lru_cache(maxsize=4096)  # 46,000 matrices of DeepSeek-V3.2 have 12 shapes
def _match(
    dtype: str, code_suffix: str, stored: Shape, scale_suffix: str, scale_dtype: str, scale: Shape, shape: Shape | None
) -> tuple[Encoding, Shape] | None:
    """The one row that fits codes and scale exactly, and the shape of the matrix."""
    if len(stored) != 2:
        return None
    for e in ENCODINGS:
        if e.codes != dtype or code_suffix not in e.code_suffixes or scale_suffix not in e.scale_suffixes:
            continue
        seen = shape or (stored[0], stored[1] * e.packed)
        if len(seen) != 2 or e.codes_shape(seen) != stored:
            continue
        if scale_dtype in e.scale_dtypes and scale in e.scale_shapes(seen):
            return e, seen
    return None


def explain_missing_tensor(name: str, entries: Mapping[str, Entry], shape: Shape | None) -> Problem:
    """There is no tensor of the matrix, but perhaps one of a format that is not in the table."""
    module, dot, _ = name.rpartition(".")
    for leaf, format in FOREIGN.items():
        entry = entries.get(module + dot + leaf)
        if entry is not None:
            text = f"is stored as {entry.name} ({format}, {entry.dtype} {list(entry.shape)}), which is not supported"
            return Problem("encoding", name, f"{text} ({SUPPORTED}): get another conversion")
    expected = "" if shape is None else f" (expected shape {list(shape)})"
    return Problem("missing", name, f"is not in the checkpoint{expected}")


def explain_codes(name: str, codes: Entry, entries: Mapping[str, Entry], shape: Shape | None) -> Problem:
    """The codes fit no row: no such format, another shape, no scale, or a scale that does not fit."""
    suffix = codes.name[len(name) :]
    rows = [e for e in ENCODINGS if e.codes == codes.dtype and suffix in e.code_suffixes]
    if not rows:
        return Problem("dtype", codes.name, f"is stored as {codes.dtype}, which is no known format ({SUPPORTED})")
    if len(codes.shape) != 2:
        text = f"holds {codes.dtype} codes and has shape {list(codes.shape)}, expected 2 axes"
        return Problem("shape", codes.name, text)
    if shape is not None:
        fitting = [e for e in rows if len(shape) == 2 and e.codes_shape(shape) == codes.shape]
        if not fitting:
            return explain_shape(codes, shape, rows)
        rows = fitting
    known = [s for s in SCALE_SUFFIXES if any(s in e.scale_suffixes for e in rows)]
    found = [entries[name + s] for s in known if name + s in entries]
    if not found:
        names = " or ".join(name.rpartition(".")[2] + s for s in known)
        return Problem(
            "missing-scale",
            codes.name,
            f"holds {codes.dtype} codes, but its scale ({names}) is not in the checkpoint;"
            " without it they mean nothing: get the shard that has it",
        )
    scale = found[0]
    text = f"is {scale.dtype} {list(scale.shape)}; {codes.dtype} codes of shape {list(codes.shape)} need"
    return Problem("scale", scale.name, f"{text} {', or '.join(spell_scale(e, codes.shape, shape) for e in rows)}")


def explain_shape(entry: Entry, shape: Shape, rows: Sequence[Encoding] = ()) -> Problem:
    """The tensor's shape is not what config.json and its format say."""
    cure = "another model's config?"
    if entry.shape == shape and entry.dtype not in PLAIN:
        read_as = " or ".join(f"{entry.dtype} codes of shape {list(e.codes_shape(shape))}" for e in rows[:1])
        text = f"holds {entry.dtype} of shape {list(shape)}, expected {read_as}: are these raw bytes of another format?"
        return Problem("shape", entry.name, text)
    if entry.shape == shape[::-1] and len(entry.shape) == 2:
        cure = "transposed?"
    packed = sorted({e.packed for e in rows if e.packed > 1})
    wanted = "".join(f", as {entry.dtype} codes {[*shape[:-1], -(-shape[-1] // n)]}" for n in packed)
    text = f"has shape {list(entry.shape)}, config.json says {list(shape)}{wanted} ({cure})"
    return Problem("shape", entry.name, text)


def spell_scale(e: Encoding, stored: Shape, shape: Shape | None) -> str:
    """`F32 or BF16 [1, 48] (FP8 128x128)`"""
    seen = shape or (stored[0], stored[1] * e.packed)
    shapes = " or ".join(str(list(s)) for s in e.scale_shapes(seen))
    return f"{' or '.join(e.scale_dtypes)} {shapes} ({e.name})"
