"""Headers as the safetensors library reads them: what it refuses is refused here by the file's name, what it opens opens
here too, unless a reason is given."""

import struct

import pytest
from safetensors import SafetensorError, deserialize

from saccade.checkpoint.header import BITS, parse_header

ENTRY = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'


def one(shape: str, size: int = 4, dtype: str = '"F32"', offsets: str = "") -> tuple[str, int]:
    return f'{{"a":{{"dtype":{dtype},"shape":{shape},"data_offsets":{offsets or f"[0,{size}]"}}}}}', size


def two(other: str) -> tuple[str, int]:
    return f'{{"a":{ENTRY},"z":{{"dtype":"F32","shape":[0],"data_offsets":{other}}}}}', 4


HEADERS: dict[str, tuple[str, int]] = {
    "plain": one("[1]"), "no axis": one("[]"), "63 axes of zero": one("[" + "1," * 15 + "0]", 0),
    "-0": one("[-0]", 0), "-0 as an offset": one("[0]", 0, offsets="[-0,0]"), "-0.0": one("[-0.0]", 0),
    "1e0": one("[1e0]"), "2.0": one("[2.0]", 8), "true": one("[true]"), "null": one("[null]"), "text": one('["1"]'),
    "-1": one("[-1]"), "01": one("[01]"), "+1": one("[+1]"), "NaN": one("[NaN]"), "Infinity": one("[Infinity]"),
    "1e999": one("[1e999]"), "5,000 digits": one("[" + "9" * 5000 + "]"), "2^64": one(f"[{2**64}]"),
    "2^63": one(f"[{2**63}]"), "0 x 2^64": one(f"[0,{2**64}]", 0), "2^40 x 2^40 x 0": one(f"[{2**40},{2**40},0]", 0),
    "0 x 2^40 x 2^40": one(f"[0,{2**40},{2**40}]", 0), "2^62 x 2 x 0": one(f"[{2**62},2,0]", 0),
    "2^62 x 4 x 0": one(f"[{2**62},4,0]", 0), "2^32 x 2^32": one(f"[{2**32},{2**32}]", 0),
    "2^60 x 0, in bits": one(f"[{2**60},0]", 0), "16 axes that overflow": one("[" + "16," * 15 + "16]", 0),
    "shape null": one("null"), "shape an object": one("{}"), "three offsets": one("[1]", offsets="[0,4,4]"),
    "offsets of floats": one("[1]", offsets="[0.0,4]"), "offsets reversed": one("[0]", 0, offsets="[4,0]"),
    "dtype in small letters": one("[1]", dtype='"f32"'), "dtype null": one("[1]", dtype="null"),
    "odd F4": one("[3]", 2, dtype='"F4"'), "F4": one("[4]", 2, dtype='"F4"'), "F6": one("[4]", 3, dtype='"F6_E2M3"'),
    "a field twice": (f'{{"a":{ENTRY[:-1]},"dtype":"F32"}}}}', 4),
    "metadata": (f'{{"__metadata__":{{"format":"pt"}},"a":{ENTRY}}}', 4),
    "metadata null": (f'{{"__metadata__":null,"a":{ENTRY}}}', 4),
    "metadata with a number": (f'{{"__metadata__":{{"n":3}},"a":{ENTRY}}}', 4),
    "metadata with null": (f'{{"__metadata__":{{"n":null}},"a":{ENTRY}}}', 4),
    "metadata with an object": (f'{{"__metadata__":{{"q":{{"a":"1"}}}},"a":{ENTRY}}}', 4),
    "metadata a list": (f'{{"__metadata__":[],"a":{ENTRY}}}', 4),
    "metadata a text": (f'{{"__metadata__":"pt","a":{ENTRY}}}', 4),
    "metadata twice": (f'{{"__metadata__":{{}},"__metadata__":{{}},"a":{ENTRY}}}', 4),
    "half a pair": (f'{{"__metadata__":{{"a":"\\ud800"}},"a":{ENTRY}}}', 4),
    "half a pair as a name": (f'{{"\\ud800":{ENTRY}}}', 4),
    "nothing": ("", 0), "no tensor": ("{}", 0), "bytes of no tensor": ("{}", 2), "spaces behind": ("{}   ", 0),
    "a space in front": (" {}", 0), "rubbish behind": ("{}x", 0), "two objects": ("{}{}", 0), "a list": ("[]", 0),
    "null alone": ("null", 0), "a mark in front": ("\ufeff{}", 0), "NUL behind": ("{}\0", 0),
    "200 deep": (f'{{"a":{ENTRY[:-1]},"x":{"[" * 200}{"]" * 200}}}}}', 4),
    "empty inside of another": two("[2,2]"), "empty in front": two("[0,0]"), "empty behind": two("[4,4]"),
    "empty beyond": two("[9,9]"), "a hole": one("[1]", 6, offsets="[2,6]"), "too much": (one("[1]")[0], 5),
    "too little": (one("[1]")[0], 3),
}  # fmt: skip
# What the library opens and Saccade refuses, on purpose.
STRICTER: dict[str, tuple[str, int]] = {
    "a size that torch and numpy cannot hold": one(f"[{2**63},0]", 0),
    "more than 16 axes, which no weight has": one("[" + ",".join(["1"] * 17) + "]"),
    "a fourth key, whose meaning is unknown": (f'{{"a":{ENTRY[:-1]},"x":1}}}}', 4),
    "an entry that is a list, against the format": ('{"a":["F32",[1],[0,4]]}', 4),
    "a dtype that is an object, against the format": one("[1]", dtype='{"F32":null}'),
    "a name twice: which one is meant?": (f'{{"a":{ENTRY},"a":{ENTRY}}}', 4),
    "a key of metadata twice": (f'{{"__metadata__":{{"a":"1","a":"2"}},"b":{ENTRY}}}', 4),
    "no name": (f'{{"":{ENTRY}}}', 4),
    "an escape sequence as a name": (f'{{"\\u001b[2J":{ENTRY}}}', 4),
}
OURS_ALONE = {"F8_E4M3FNUZ", "F8_E5M2FNUZ"}  # hardware's spellings, for which some versions have no name


def judge(header: str, size: int) -> tuple[bool, bool]:
    """Whether the library opens a file, and whether this reader does."""
    raw = header.encode()
    raw = struct.pack("<Q", len(raw)) + raw + bytes(size)
    try:
        deserialize(raw)
        opens = True
    except SafetensorError:
        opens = False
    _, problems = parse_header(raw, "m.safetensors", len(raw))
    for problem in problems:
        assert "m.safetensors" in problem.name + problem.text
        assert "".join(problem).isprintable() and len(problem.text) < 300
    return opens, not problems


@pytest.mark.parametrize("case", HEADERS)
def test_what_the_library_refuses_is_refused_and_what_it_opens_opens(case: str) -> None:
    library, ours = judge(*HEADERS[case])
    assert ours == library


@pytest.mark.parametrize("case", STRICTER)
def test_what_only_saccade_refuses_has_a_reason(case: str) -> None:
    assert judge(*STRICTER[case]) == (True, False)


@pytest.mark.parametrize("dtype", [*BITS, "F8_E3M4", "C128", "U4", "I4", "FLOAT32"])
def test_dtypes_are_the_librarys(dtype: str) -> None:
    size = BITS.get(dtype, 8)  # of 8 elements
    library, ours = judge(*one("[8]", size, dtype=f'"{dtype}"'))
    assert ours == library or dtype in OURS_ALONE
