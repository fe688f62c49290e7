"""Mutated headers, index.json and config.json, judged in memory against the safetensors library and plain JSON.

A header is refused as Problems, or it says what the library says, entry by entry. An index.json is refused, or each of
its names is in the file that it names. A config.json is a ConfigError, or has the sizes that JSON gives, and any plan
with it is a plan or a SaccadeError. `python tests/helpers/fuzzing fuzz_headers CASE` repeats one case.
"""

import functools
import json
import sys
from collections.abc import Sequence
from random import Random
from typing import Any

from fuzzing import TEXTS, Failure, hostile, mutate_bytes, mutate_json, near
from safetensors import SafetensorError, deserialize
from tiny_models import tiny_dict

from saccade.checkpoint.header import BITS
from saccade.checkpoint.index import INDEX_FILE, Index, build_index, parse_header
from saccade.checkpoint.starts import Header
from saccade.errors import ConfigError, Problem, SaccadeError
from saccade.models.dsa.config import SIZES, ModelConfig
from saccade.plan import make_plan, prove
from saccade.plan.problems import show_problems

Pairs = list[tuple[str, Any]]

DTYPES = (*BITS, "F8_E4M3B11", "f32", "BF16 ", "", "F4E2M1")
# Dtypes that this reader knows by size, in the spelling of hardware that the library has no name for.
OURS_ALONE = {"F8_E4M3FNUZ", "F8_E5M2FNUZ"}


def spell(pairs: Pairs) -> bytes:
    """JSON of an object that may hold a name twice."""
    items = (f"{json.dumps(name)}:{json.dumps(value)}" for name, value in pairs)
    return ("{" + ",".join(items) + "}").encode()


def pack(header: bytes, data: bytes, length: int | None = None) -> bytes:
    claimed = len(header) if length is None else length
    return (claimed % 2**64).to_bytes(8, "little") + header + data


def base_pairs(dice: Random) -> tuple[Pairs, int]:
    """A sound header of a few tensors, and how many bytes they have."""
    pairs: Pairs = [("__metadata__", {"format": "pt"})] if dice.random() < 0.5 else []
    at = 0
    for i in range(dice.randrange(1, 7)):
        dtype = dice.choice(("BF16", "F32", "F8_E4M3", "U8", "I64", "F8_E8M0", "F16", "I8"))
        shape = [dice.randrange(1, 5) for _ in range(dice.randrange(3))]
        size = BITS[dtype] // 8
        for n in shape:
            size *= n
        name = f"model.layers.{i}.self_attn.indexer.wk.weight" + dice.choice(("", "_scale_inv"))
        pairs.append((name, {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}))
        at += size
    return pairs, at


def is_whole(value: Any) -> bool:
    """Whether a value still has the form of an entry, whatever its numbers are."""
    if not isinstance(value, dict) or not value.keys() >= {"dtype", "shape", "data_offsets"}:
        return False
    shape, offsets = value["shape"], value["data_offsets"]
    if not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2:
        return False
    return all(type(n) is int for n in (*shape, *offsets))


def mutate_pairs(pairs: Pairs, dice: Random) -> Pairs:
    pairs = [(name, json.loads(json.dumps(value))) for name, value in pairs]
    at = dice.randrange(len(pairs))
    other = dice.randrange(len(pairs))
    (name, value), kind = pairs[at], dice.randrange(12)
    if kind == 0:
        pairs.insert(other, (name, pairs[other][1]))  # a name twice
    elif kind == 1:
        pairs[at] = (dice.choice(TEXTS), value)
    elif kind == 2:
        pairs[at], pairs[other] = pairs[other], pairs[at]  # order means nothing
    elif kind == 3:
        pairs[at], pairs[other] = (name, pairs[other][1]), (pairs[other][0], value)
    elif kind == 4:
        del pairs[at]
    elif kind == 5:
        pairs[at] = (name, hostile(dice))
    elif not is_whole(value):
        pairs[at] = (name, mutate_json(value, dice))
    elif kind == 6:
        value["dtype"] = dice.choice(DTYPES)
    elif kind == 7:
        dice.shuffle(value["shape"])
        value["shape"].insert(dice.randrange(3), 1)
    elif kind == 8 and value["shape"]:
        axis = dice.randrange(len(value["shape"]))
        value["shape"][axis] = near(value["shape"][axis], dice)
    elif kind == 9:
        value["data_offsets"][dice.randrange(2)] += dice.choice((-8, -4, -1, 1, 4, 8, 2**40, 2**62))
    elif kind == 10:
        value["shape"] = [dice.choice((0, 1, 2**20, 2**31, 2**60, 2**62)) for _ in range(dice.randrange(5))]
    else:
        pairs[at] = (name, mutate_json(value, dice))
    return pairs


def readable(problems: Sequence[Problem]) -> str:
    """The first problem's kind; Failure if a problem cannot be shown to people."""
    for p in problems:
        if not (p.kind and p.name and p.text) or not "".join(p).isprintable() or len(p.text) > 600:
            raise Failure(f"cannot be shown: {p!r}"[:500])
    show_problems(problems)
    return problems[0].kind


def judge_header(dice: Random) -> str:
    pairs, size = base_pairs(dice)
    data, length = dice.randbytes(size), None
    for _ in range(dice.choice((1, 1, 2, 3))):
        pairs = mutate_pairs(pairs, dice) if pairs and dice.random() < 0.8 else pairs
    header = spell(pairs)
    if dice.random() < 0.3:
        header = mutate_bytes(header, dice)
    if dice.random() < 0.1:
        length = dice.choice((0, 1, len(header) - 1, len(header) + 1, 2**31, 2**63, 2**64 - 1, 10**8, 10**8 + 1))
    raw = pack(header, data, length)
    if dice.random() < 0.1:
        raw = mutate_bytes(raw, dice)
    entries, problems = parse_header(raw, "m.safetensors", len(raw))
    if problems:
        return "header refused: " + readable(problems)
    if any(e.dtype in OURS_ALONE for e in entries.values()):
        return "header read: a dtype that the library has no name for"
    try:
        found = dict(deserialize(raw))
    except SafetensorError as e:
        raise Failure(f"read, but the library refuses it: {e}; {raw!r}"[:900]) from None
    ours = {n: (e.dtype, list(e.shape), raw[e.start : e.stop]) for n, e in entries.items()}
    theirs = {n: (t["dtype"], t["shape"], bytes(t["data"])) for n, t in found.items()}
    if ours != theirs:
        raise Failure(f"read as {ours}, by the library as {theirs}"[:900])
    return "header read as the library reads it"


def judge_index(dice: Random) -> str:
    """Two or three files of two tensors each, and an index.json; both may be changed."""
    held = {f"m-{i}.safetensors": [f"a{i}", f"b{i}"] for i in range(dice.randrange(2, 4))}
    where = {name: file for file, names in held.items() for name in names}
    if dice.random() < 0.3:  # a file more or less, or a name that stands in two
        file = dice.choice(list(held))
        if dice.random() < 0.5:
            del held[file]
        held[dice.choice(("mtp.safetensors", "m-0.safetensors"))] = dice.sample(["a0", "b0", "c", "d"], 2)
    listing: Any = {"metadata": {}, "weight_map": where}
    if dice.random() < 0.9:
        listing = mutate_json(listing, dice)
    text = json.dumps(listing).encode()
    if dice.random() < 0.4:
        text = mutate_bytes(text, dice)
    headers = []
    for file, names in held.items():
        header = {n: {"dtype": "U8", "shape": [2], "data_offsets": [2 * i, 2 * i + 2]} for i, n in enumerate(names)}
        raw = json.dumps(header).encode()
        headers.append(Header(file, 8 + len(raw) + 4, len(raw).to_bytes(8, "little") + raw))
    is_listed = dice.random() < 0.85
    index = build_index("root", Header(INDEX_FILE, len(text), text) if is_listed else None, headers)
    if index.problems:
        return "index.json refused: " + readable(index.problems)
    listed = json.loads(text)["weight_map"] if is_listed else {}
    for name, file in listed.items():
        if name not in held.get(file, ()) or index.entries[name].file != file:
            raise Failure(f"{name} is not taken from {file}: {text!r}")
    for name, entry in index.entries.items():
        others = [file for file, names in held.items() if name in names and file != entry.file]
        if name not in held[entry.file] or (others and name not in listed):
            raise Failure(f"{name} is taken from {entry.file}, and is in {others}: {text!r}")
    return "index.json read as it stands"


def judge_config(dice: Random) -> str:
    values: Any = tiny_dict(quantization_config={"scale_fmt": "ue8m0"}, architectures=["X"])
    for _ in range(dice.choice((0, 1, 1, 2))):
        values = mutate_json(values, dice)
    text = json.dumps(values).encode()
    if dice.random() < 0.3:
        text = mutate_bytes(text, dice)
    try:
        config = ModelConfig.from_json(text)
    except ConfigError as e:
        if not str(e).replace("\n", "").isprintable():
            raise Failure(f"cannot be shown: {str(e)!r}"[:500]) from None
        return "config.json refused"
    said = json.loads(text)
    if wrong := [k for k in SIZES if getattr(config, k) != said[k]]:
        raise Failure(f"{wrong} are not what config.json says")
    try:
        readable(prove(make_plan(config, empty_index())))
    except SaccadeError:
        return "config.json read, its plan refused"
    return "config.json read, planned"


@functools.cache
def empty_index() -> Index:
    return build_index("root", None, [])


def judge(case: int) -> str:
    dice = Random(case)
    return dice.choices((judge_header, judge_index, judge_config), (8, 1, 1))[0](dice)


if __name__ == "__main__":
    print(judge(int(sys.argv[1])))
