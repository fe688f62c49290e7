"""One safetensors header -> entries. Everything that is wrong with it becomes a Problem.

A file is 8 bytes of header length (little endian), a JSON header, then the tensors' bytes, which must tile the rest of
the file: no hole, no overlap, nothing after. A file for which this holds cannot make a reader run past an end. Knows no
torch, no directory and no network: local files (index.py) and remote ones (remote.py) hand in the same bytes.
"""

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from saccade.base.printable import escape
from saccade.base.strict_json import parse_json as parse_json
from saccade.base.values import show_count
from saccade.errors import Problem

# Bits per element. Sub-byte dtypes count elements in their shape and must fill whole bytes.
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
HEADER_LIMIT = 100_000_000  # the format's own limit; DeepSeek-V3.2's largest shard header has 0.1 MB
AXES_LIMIT = 16
NUMBER_LIMIT = 2**63  # of sizes and offsets: torch and numpy count in signed integers of 64 bits
WORD = 2**64  # the safetensors library multiplies sizes in unsigned ones
POINTER, POINTER_LIMIT = b"version https://git-lfs", 1024  # how a Git LFS pointer begins; its bytes are fewer
NAME_LIMIT = 300  # characters; published names have up to 90
CURE = "download the file again"


class Entry(NamedTuple):
    """A tensor in a file: where its bytes are, and what they mean."""

    name: str
    dtype: str  # safetensors spelling
    shape: tuple[int, ...]
    file: str  # relative to the checkpoint's root
    start: int  # absolute byte span in the file, half-open
    stop: int


def header_bytes(first: bytes, file: str, size: int) -> int | Problem:
    """How many bytes from the start of a file of `size` bytes are its header, told from its first 8 bytes."""
    if size < 8 or len(first) < 8:
        return Problem(
            "truncated", file, f"has {min(size, len(first))} bytes, too few for a safetensors header; {CURE}"
        )
    if pointer := explain_pointer(first, size):
        return Problem("header", file, f"{pointer}; {CURE}")
    length = int.from_bytes(first[:8], "little")
    if length > HEADER_LIMIT:
        text = f"claims a header of {length:,} bytes (limit {HEADER_LIMIT:,}), so it is no safetensors file; {CURE}"
        return Problem("header", file, text)
    if 8 + length > size:
        return Problem("truncated", file, f"has {size:,} bytes, but its header alone needs {8 + length:,}; {CURE}")
    return 8 + length


def explain_pointer(first: bytes, size: int) -> str | None:
    """Why a file of `size` bytes is not the file itself but what stands for it in a clone without git-lfs; None if it
    is no such pointer. Its first 8 bytes tell."""
    if size > POINTER_LIMIT or len(first) < 8 or not POINTER.startswith(first[: len(POINTER)]):
        return None
    return f"is a Git LFS pointer of {size} bytes, not the file itself; run git lfs pull"


def parse_header(raw: bytes, file: str, size: int) -> tuple[dict[str, Entry], list[Problem]]:
    """The entries of a file of `size` bytes, from its first bytes: the length and the whole JSON header.

    An entry that is wrong by itself is a Problem and is left out. Entries that are wrong only together (they overlap,
    or the file is too short) are all kept, so that a plan does not call them missing as well.
    """
    end = header_bytes(raw, file, size)
    if isinstance(end, Problem):
        return {}, [end]
    if len(raw) < end:
        return {}, [Problem("truncated", file, f"gave {len(raw):,} bytes of its {end:,}-byte header; {CURE}")]
    try:
        table, repeated = parse_json(raw[8:end])
    except ValueError as e:
        return {}, [Problem("header", file, f"has a header that is not JSON ({str(e)[:80]}); {CURE}")]
    if not isinstance(table, dict):
        text = f"has a header that is a JSON {type(table).__name__}, expected an object; {CURE}"
        return {}, [Problem("header", file, text)]
    problems = [
        Problem(
            "duplicate", show_name(key), f"stands twice in the header of {file}: which one is meant is unknown; {CURE}"
        )
        for key in repeated
    ]
    if not is_metadata(table.get("__metadata__", {})):
        text = f"has a header whose __metadata__ is not a table of text, as the format demands; {CURE}"
        problems.append(Problem("header", file, text))
    entries: dict[str, Entry] = {}
    for name, value in table.items():
        if name == "__metadata__":
            continue
        entry = read_entry(name, value, file, end) if is_name(name) else refuse_name(name, f"the header of {file}")
        if isinstance(entry, Problem):
            problems.append(entry)
        else:
            entries[name] = entry
    if len(entries) == len(table) - ("__metadata__" in table):  # an entry left out would look like a hole
        problems += check_tiling(entries, file, end, size)
    return entries, problems


def is_metadata(value: Any) -> bool:
    """Whether a header's `__metadata__` is what the format allows: text by text, without half of a surrogate pair; or
    null, which the safetensors library reads as if it were not there."""
    if value is None:
        return True
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        return False
    try:
        "".join((*value, *value.values())).encode()
    except UnicodeEncodeError:
        return False
    return True


def is_name(name: str) -> bool:
    """Whether a tensor or file may be called so: printable and not absurdly long."""
    return 0 < len(name) <= NAME_LIMIT and name.isprintable()


def show_name(name: str) -> str:
    """A name from a file, fit for print whatever is in it; one that `is_name` stays as it is."""
    return name if is_name(name) else f"'{escape(name[:60])}'" + ("..." if len(name) > 60 else "")


def refuse_name(name: str, where: str) -> Problem:
    text = f"of {len(name):,} characters in {where} is no name: expected 1 to {NAME_LIMIT} printable characters; {CURE}"
    return Problem("name", show_name(name), text)


def read_entry(name: str, value: Any, file: str, base: int) -> Entry | Problem:
    """One line of a header, `base` bytes into the file; or what is wrong with it."""
    try:
        dtype, shape, (start, stop) = value["dtype"], value["shape"], value["data_offsets"]
        bits = BITS[dtype]
        if type(shape) is not list or len(shape) > AXES_LIMIT or len(value) > 3:  # a fourth key has an unknown meaning
            raise ValueError
        for n in (start, stop, *shape):
            if type(n) is not int or not 0 <= n < NUMBER_LIMIT:
                raise ValueError
        if start > stop:
            raise ValueError
        elements = count_elements(shape, bits)
    except (KeyError, TypeError, ValueError):
        dtype = value.get("dtype") if isinstance(value, dict) else None
        if isinstance(dtype, str) and dtype not in BITS:
            return Problem("dtype", name, f"has the unknown dtype {dtype[:20]!r} in {file}; {CURE}")
        text = (
            f"has no valid dtype, shape and data_offsets in the header of {file} ({reprlib.repr(value)[:100]}); {CURE}"
        )
        return Problem("entry", name, text)
    shape = tuple(shape)
    if elements is None or elements * bits != (stop - start) * 8:
        expected = "fewer than 2^61 bytes" if elements is None else f"{elements * bits / 8:,.0f} bytes"
        text = f"is {dtype} {str(shape)[:100]} in {file}: expected {expected}, found {stop - start:,}; {CURE}"
        return Problem("bytes", name, text)
    return Entry(name, dtype, shape, file, base + start, base + stop)


def count_elements(shape: Sequence[int], bits: int) -> int | None:
    """How many elements of `bits` bits a shape has; None if that overflows 64 bits on the way, as in the safetensors
    library: 2^40 x 2^40 x 0 is none, and no reader should have to find out what it is."""
    product = 1
    for n in shape:
        product *= n
        if product >= WORD:
            return None
    return None if product * bits >= WORD else product


def check_tiling(entries: Mapping[str, Entry], file: str, base: int, size: int) -> list[Problem]:
    """The tensors follow each other without hole or overlap, from the header to the last byte of the file."""
    end = base
    for entry in entries.values():  # writers list tensors in file order, so this alone settles almost every file
        if entry.start != end:
            break
        end = entry.stop
    else:
        if end == size:
            return []
    problems: list[Problem] = []
    end, last = base, "the header"
    for entry in sorted(entries.values(), key=lambda e: (e.start, e.stop)):
        if entry.start < end:
            common = min(end, entry.stop) - entry.start  # none, if an empty tensor lies inside of another
            text = f"overlaps {last} by {common:,} bytes in {file}; {CURE}"
            problems.append(Problem("overlap", entry.name, text))
        elif entry.start > end:
            text = f"has {entry.start - end:,} bytes between {last} and {entry.name} that belong to no tensor; {CURE}"
            problems.append(Problem("hole", file, text))
        if entry.stop > end:
            end, last = entry.stop, entry.name
    if size < end:
        cut = [e.name for e in entries.values() if e.stop > size]
        text = (
            f"has {size:,} bytes, expected {end:,}: {show_count(len(cut), 'tensor')} cut off (one is {cut[0]}); {CURE}"
        )
        problems.append(Problem("truncated", file, text))
    elif size > end:
        problems.append(Problem("oversized", file, f"has {size:,} bytes, expected {end:,}; {CURE}"))
    return problems
