"""What differs between two checkpoints, told from config.json and headers alone: `saccade plan A --diff B`.

Tensors, how they are stored, files, config keys, and what the engine would hold. That two checkpoints are equal here
says nothing of their numbers. Standard library only. Next: fold.py, which makes 14,848 experts one line.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from saccade.base.values import show_count
from saccade.checkpoint.coding import find_codes, find_coding
from saccade.checkpoint.encoding import weight_of
from saccade.checkpoint.index import Entry, Index
from saccade.checkpoint.open import looks_remote, open_raw
from saccade.errors import Problem
from saccade.models.parameters import Layout, Shape
from saccade.models.registry import make_config
from saccade.plan import find_shapes, make_plan, prove
from saccade.plan.fold import fold_lines, pick, split
from saccade.plan.show import show_bytes
from saccade.plan.types import Plan

ABSENT = "absent"
VALUE_SHOWN = 60  # characters of a config value
DIFFERENCE_LINES = 100  # under one title
LISTED = 8  # of the items by which two long lists in a config differ
TITLES = {
    "config": "config.json",
    "file": "files",
    "tensor": "tensors",
    "dtype": "dtype of tensors",
    "shape": "shape of tensors",
    "encoding": "encoding of tensors",
    "held": "parameters that the engine would hold",
    "problem": "problems",
}


class Difference(NamedTuple):
    """One thing that A and B have, or have otherwise."""

    kind: str  # a key of TITLES
    name: str  # of the tensor, parameter or config key
    a: str
    b: str


@dataclass(frozen=True)
class Side:
    """A checkpoint, with its config.json as it stands there."""

    plan: Plan
    values: Mapping[str, Any]
    problems: int  # of its proof


def open_side(
    model: str, layout: Layout, dtype: str, mtp: bool, tell: Callable[[str], None], revision: str | None = None
) -> Side:
    """A model by path or id at `revision`; `tell` hears what had to be fetched for it, and whether it is unsound."""
    is_remote = looks_remote(model)
    raw, source, index = open_raw(model, revision=revision, tell=tell)
    if is_remote and index.root == model:
        tell(f"fetched {index.bytes_read:,} bytes of {model}")
    plan = make_plan(make_config(raw, source), index, layout, dtype, mtp)
    problems = prove(plan)
    if problems:
        tell(f"{index.title}: incomplete, {show_count(len(problems), 'problem')}; `saccade check` names them")
    return Side(plan, json.loads(raw), len(problems))


def diff(a: Side, b: Side) -> list[Difference]:
    """Every difference, in the order of TITLES; [] if config, headers and plans are equal."""
    one, other = a.plan.index, b.plan.index
    found = [*_diff_config(a.values, b.values), *_diff_files(one, other), *_diff_tensors(a.plan, b.plan)]
    held = [{s.name: f"{s.dtype} {list(s.shape)}, {s.nbytes} B" for s in x.plan.stored.values()} for x in (a, b)]
    found += _diff_texts("held", *held)
    if a.problems != b.problems:
        found.append(Difference("problem", "of the proof", str(a.problems), str(b.problems)))
    order = list(TITLES)
    return sorted(found, key=lambda d: order.index(d.kind))  # stable


def _diff_config(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = "") -> Iterator[Difference]:
    for key in dict.fromkeys([*a, *b]):
        name, one, other = prefix + key, a.get(key, ABSENT), b.get(key, ABSENT)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            yield from _diff_config(one, other, name + ".")
        elif (key in a) != (key in b) or _spell(one) != _spell(other):
            shown = _show_lists(one, other) if isinstance(one, list) and isinstance(other, list) else None
            yield Difference("config", name, *(shown or (_show(key in a, one), _show(key in b, other))))


def _spell(value: Any) -> str:
    """Equal for equal JSON: true is not 1, and the order of keys says nothing."""
    return json.dumps(value, sort_keys=True)


def _show(is_there: bool, value: Any) -> str:
    text = _spell(value) if is_there else ABSENT
    return text if len(text) <= VALUE_SHOWN else text[:VALUE_SHOWN] + "..."


def _show_lists(a: list[Any], b: list[Any]) -> tuple[str, str] | None:
    """Lists that are too long to show, as their lengths and what only one of them has."""
    if max(len(_spell(a)), len(_spell(b))) <= VALUE_SHOWN:
        return None

    def show(mine: list[Any], others: list[Any]) -> str:
        theirs = set(map(_spell, others))
        only = [line.text for line in fold_lines(dict.fromkeys(t for t in map(_spell, mine) if t not in theirs))]
        more = ["..."] if len(only) > LISTED else []
        return f"{len(mine)} items" + (f", only here: {', '.join(only[:LISTED] + more)}" if only else "")

    return show(a, b), show(b, a)


def _diff_files(a: Index, b: Index) -> Iterator[Difference]:
    counts, sizes = zip(*((str(len(x.files)), f"{sum(f.size for f in x.files)} B") for x in (a, b)), strict=True)
    for name, (one, other) in (("count", counts), ("bytes", sizes)):
        if one != other:
            yield Difference("file", name, one, other)


def _diff_tensors(a: Plan, b: Plan) -> Iterator[Difference]:
    whole = [{name: _describe(entry) for name, entry in x.index.entries.items()} for x in (a, b)]
    yield from (d for d in _diff_texts("tensor", *whole) if ABSENT in (d.a, d.b))
    shapes = [find_shapes(x.config, x.index) for x in (a, b)]
    for name, one in a.index.entries.items():
        other = b.index.entries.get(name)
        if other is None:
            continue
        if one.dtype != other.dtype:
            yield Difference("dtype", name, one.dtype, other.dtype)
        if one.shape != other.shape:
            yield Difference("shape", name, str(list(one.shape)), str(list(other.shape)))
        matrix = weight_of(name) or name
        stored, as_other = (_find_stored(matrix, x.index, s.get(matrix)) for x, s in zip((a, b), shapes, strict=True))
        if stored != as_other and find_codes(matrix, a.index.entries) is one:  # scales go with their codes
            yield Difference("encoding", name, _show_stored(stored), _show_stored(as_other))


def _diff_texts(kind: str, a: Mapping[str, str], b: Mapping[str, str]) -> Iterator[Difference]:
    for name in dict.fromkeys([*a, *b]):
        one, other = a.get(name, ABSENT), b.get(name, ABSENT)
        if one != other:
            yield Difference(kind, name, one, other)


def _describe(entry: Entry) -> str:
    return f"{entry.dtype} {list(entry.shape)}"


def _find_stored(name: str, index: Index, shape: Shape | None) -> tuple[str, str, str]:
    """The encoding of a matrix, and name and dtype of the scale without its own; shapes are compared by themselves."""
    coding = find_coding(name, index.entries, shape)
    if coding is None:
        return "plain", "", ""
    if isinstance(coding, Problem):
        return f"unreadable ({coding.kind})", "", ""
    return coding.encoding.name, coding.scale.removeprefix(name), index.entries[coding.scale].dtype


def _show_stored(stored: tuple[str, str, str]) -> str:
    """`FP8 128x128, _scale_inv in F32`, or `plain`."""
    encoding, suffix, dtype = stored
    return f"{encoding}, {suffix} in {dtype}" if suffix else encoding


def show_diff(a: Side, b: Side, differences: Sequence[Difference]) -> str:
    """The two checkpoints in a line each, then what differs, folded: `name: in A | in B`."""
    lines = []
    for letter, side in (("A", a), ("B", b)):
        index = side.plan.index
        size, held = show_bytes(_count_bytes(index)), show_bytes(side.plan.device_bytes)
        what = f"{show_count(len(index.entries), 'tensor')} in {show_count(len(index.files), 'file')}, {size}"
        lines.append(f"{letter}  {index.title}: {what}; held in {held}")
    if not differences:
        return "\n".join([*lines, "equal in config.json, headers and plan; no tensor byte was read"])
    number = pick(d.name for d in differences)
    alike: dict[tuple[str, str, str, str], list[Difference]] = {}
    for d in differences:
        alike.setdefault((d.kind, split(d.name, number)[0], d.a, d.b), []).append(d)
    title, shown, left = "", 0, 0  # lines under a title, and differences that got none
    counts = Counter(d.kind for d in differences)
    for (kind, _, one, other), group in alike.items():
        if kind != title:
            lines += [f"  and {left:,} more"] if left else []
            title, shown, left = kind, 0, 0
            lines += ["", f"{TITLES[kind]} ({counts[kind]:,})"]
        if shown == DIFFERENCE_LINES:
            left += len(group)
            continue
        for line in fold_lines((d.name for d in group), number=number):
            if shown == DIFFERENCE_LINES:
                left += len(line.members)
                continue
            shown += 1
            count = f" ({len(line.members):,} of them)" if len(line.members) > 1 else ""
            lines.append(f"  {line.text}{count}: {one} | {other}")
    lines += [f"  and {left:,} more"] if left else []
    return "\n".join(lines)


def diff_json(a: Side, b: Side, differences: Sequence[Difference]) -> dict[str, Any]:
    """Nothing folded. Keys: format: 1. a, b: root, tensors, files, tensor_bytes, device_bytes, problems. equal.
    differences: kind (config, file, tensor, dtype, shape, encoding, held, problem), name, a and b, as texts."""
    sides = [
        {
            "root": x.plan.index.root,
            "tensors": len(x.plan.index.entries),
            "files": len(x.plan.index.files),
            "tensor_bytes": _count_bytes(x.plan.index),
            "device_bytes": x.plan.device_bytes,
            "problems": x.problems,
        }
        for x in (a, b)
    ]
    found = [d._asdict() for d in differences]
    return {"format": 1, "a": sides[0], "b": sides[1], "equal": not differences, "differences": found}


def _count_bytes(index: Index) -> int:
    return sum(entry.stop - entry.start for entry in index.entries.values())
