"""The proof that a plan is complete, before any tensor byte is read.

Tiling: the steps of each stored tensor cover it exactly once: in bounds, no overlap, no hole. Consumption: over all
ranks, every element of every checkpoint tensor is read, or ignored for a stated reason, never both. All problems
are returned, none raised: a person mends ten at once more easily than one by one.
"""

from collections.abc import Sequence
from functools import lru_cache
from math import prod

from saccade.checkpoint.coding import Coding, find_codes, find_coding
from saccade.checkpoint.encoding import CODE_SUFFIXES, PLAIN, STORED_LEAVES, weight_of
from saccade.checkpoint.leftovers import CHANGES
from saccade.errors import Problem
from saccade.models.parameters import Box, Shape
from saccade.plan.keep import ONE, cell_box, packed_box
from saccade.plan.lower import CASTS
from saccade.plan.types import LoadStep, Plan, Stored, show_box


def check(plan: Plan) -> list[Problem]:
    """What is wrong with one rank's plan and the checkpoint behind it; [] is the proof that it tiles, by allowed casts,
    with every code and its own scale."""
    problems = [*plan.index.problems, *plan.problems]
    entries, stored = plan.index.entries, plan.stored
    placed: dict[str, list[LoadStep]] = {name: [] for name in stored}
    for step in plan.steps:
        target, put, op, source, take, view, coding = step  # unpacked: 119,000 steps of GLM-5 take 0.1 s less
        held, entry = stored.get(target), entries.get(source)
        if held is None or entry is None:
            name, role = (target, "target") if held is None else (source, "source")
            problems.append(Problem("step", name, f"is the {role} of a step, but does not exist"))
            continue
        placed[target].append(step)
        shape = entry.shape if coding is None else coding.shape
        fault = find_step_fault(op, entry.dtype, held.dtype, shape, view, take, put)
        if fault is None and op == "dequantize":
            fault = find_coding_fault(step, plan)
        if fault:
            problems.append(Problem("step", target, f"{op} of {source} {show_box(take)}: {fault}"))
    for name, held in stored.items():
        fault = find_tiling_fault(held.shape, tuple([step.put for step in placed[name]]))
        if fault:
            problems.append(Problem("tiling", name, f"{list(held.shape)} is not filled exactly once: {fault}"))
        if held.encoding is not None and (fault := find_kept_fault(held, placed)):
            problems.append(Problem("step", name, fault))
    return problems


@lru_cache(maxsize=8192)  # 92,363 steps of DeepSeek-V3.2 are of 1,600 kinds
def find_step_fault(
    op: str, source: str, target: str, shape: Shape, view: Shape | None, take: Box, put: Box
) -> str | None:
    """Why a step from a tensor of dtype `source` to one of dtype `target` is wrong, or None: the cast is not in the
    table, the box is not inside the tensor, or the two boxes differ in size. How `put` tiles: `find_tiling_fault`."""
    if view is not None and prod(view) != prod(shape):
        return f"{list(shape)} cannot be seen as {list(view)}"
    seen = shape if view is None else view
    if len(take) != len(seen) or any(not 0 <= lo < hi <= n for (lo, hi), n in zip(take, seen, strict=True)):
        return f"is not inside {list(seen)}"
    if op == "dequantize":
        allowed = source not in PLAIN and target in ("BF16", "F32")
    elif source in PLAIN:
        allowed = CASTS.get((source, target)) == op
    else:  # codes stay codes, and a scale of one byte becomes F32
        allowed = (op == "copy" and source == target) or (op == "widen" and (source, target) == ("F8_E8M0", "F32"))
    if not allowed:
        return f"{source} to {target} is not an allowed cast"
    sides = [hi - lo for lo, hi in take]
    placed = [hi - lo for lo, hi in put]
    if len(placed) > len(sides):  # an expert's place in its stack
        first, *placed = placed
        sides = sides if first == 1 else []
    return None if sides == placed else f"goes to {show_box(put)}: sizes differ"


def find_coding_fault(step: LoadStep, plan: Plan) -> str | None:
    """Whether codes are multiplied by their own scales, all of them, in the groups of their format."""
    coding = step.coding
    if coding is None:
        return "its source holds no codes with a scale"
    entries = plan.index.entries
    found = find_coding(weight_of(step.source) or step.source, entries, coding.shape)
    if found != coding or coding.codes != step.source:
        return f"{' and '.join(coding.partners)} by {coding.encoding.group} are not the scales of {step.source}"
    if coding.offset is not None and coding.offset not in plan.zeros:
        return f"nothing makes sure that {coding.offset} is zero"
    return None


def find_kept_fault(codes: Stored, placed: dict[str, list[LoadStep]]) -> str | None:
    """Whether each box of codes that is kept has its own scales beside it, in the cells of its format."""
    encoding, group = codes.encoding, codes.group
    assert encoding is not None and group is not None
    cell = (group[0], group[1] * encoding.scales_packed)
    partners = [(".scale", encoding.scale_suffixes)]
    if encoding.global_suffix is not None:
        partners.append((".global_scale", (encoding.global_suffix,)))
    for leaf, suffixes in partners:
        scales = placed.get(codes.name + leaf, [])
        if len(scales) != len(placed[codes.name]):
            return f"has {len(placed[codes.name])} parts, but {len(scales)} in {codes.name}{leaf}"
        for code, scale in zip(placed[codes.name], scales, strict=True):
            weight = weight_of(code.source) or code.source
            if not scale.source.startswith(weight) or scale.source[len(weight) :] not in suffixes:
                return f"its codes and its scales come from different tensors: {code.source}, {scale.source}"
            take, put = _unpacked(code.take, encoding.packed), _unpacked(code.put, encoding.packed)
            if leaf == ".scale":
                wanted = cell_box(take, encoding.cell), cell_box(put, cell)
            else:
                wanted = ONE, cell_box(put, _sides(put))
            if (scale.take, scale.put) != wanted:
                return f"{scale.source} {show_box(scale.take)} is not the scale of {code.source} {show_box(code.take)}"
    return None


@lru_cache(maxsize=4096)
def _sides(put: Box) -> Shape:
    return tuple(hi - lo for lo, hi in put[-2:])


@lru_cache(maxsize=4096)
def _unpacked(box: Box, packed: int) -> Box:
    """The numbers that a box of elements of codes holds."""
    return (*box[:-1], (box[-1][0] * packed, box[-1][1] * packed))


def check_sources(plans: Sequence[Plan]) -> list[Problem]:
    """Which checkpoint tensors are not wholly read by the given ranks together, nor ignored."""
    index = plans[0].index
    reads: dict[str, tuple[Box, ...]] = {}  # distinct boxes: replicas read the same
    views: dict[str, Shape] = {}
    for plan in plans:
        for step in plan.steps:
            _, _, _, source, take, view, coding = step
            if coding is not None:
                packed = coding.encoding.packed
                if packed > 1:
                    take, view = packed_box(take, packed), view and coding.encoding.codes_shape(view)
                views[coding.scale] = coding.encoding.scale_shape(coding.shape)
                _add_box(reads, coding.scale, _scale_box(step))
                if coding.global_scale is not None:
                    views[coding.global_scale] = (1, 1)
                    _add_box(reads, coding.global_scale, ONE)
            if view is not None:
                views[source] = view
            _add_box(reads, source, take)
        for name in plan.zeros:
            reads[name] = (tuple((0, n) for n in index.entries[name].shape),)
    ignored = {i.name: i.reason for plan in plans for i in plan.ignored}
    blamed = {p.name for plan in plans for p in plan.problems} | _sources_of_holes(plans)
    problems = []
    for name, entry in index.entries.items():
        boxes = reads.get(name)
        if boxes is None:
            if name not in ignored and name not in blamed and weight_of(name) not in blamed:
                problems.append(Problem("unused", name, _explain_unused(name, plans[0])))
            continue
        if name in ignored:
            problems.append(Problem("unused", name, f"is both read and ignored ({ignored[name]})"))
        shape = views.get(name, entry.shape)
        if not _is_covered(shape, boxes):
            text = f"{list(shape)} is read only in part by {len(plans)} rank(s): {_name_hole(shape, boxes)}"
            problems.append(Problem("partly-read", name, text))
    return problems


def _add_box(reads: dict[str, tuple[Box, ...]], name: str, box: Box) -> None:
    boxes = reads.get(name)
    if boxes is None:
        reads[name] = (box,)
    elif box not in boxes:
        reads[name] = (*boxes, box)


@lru_cache(maxsize=1024)  # layers repeat: 1,665 parameters of DeepSeek-V3.2 are tiled in 25 ways
def find_tiling_fault(shape: Shape, boxes: tuple[Box, ...]) -> str | None:
    """Why boxes do not tile [0, shape) exactly once, or None if they do."""
    ordered = sorted(boxes)
    filled = 0
    for box in ordered:
        if len(box) != len(shape) or any(lo < 0 or hi > n or lo >= hi for (lo, hi), n in zip(box, shape, strict=True)):
            return f"{show_box(box)} is out of bounds"
        filled += prod([hi - lo for lo, hi in box])
    # Sorted by first row, only boxes whose rows still reach into the next one's can overlap it: for 256 stacked
    # experts that is two at a time.
    active: list[Box] = []
    for box in ordered:
        first = box[0][0]
        active = [other for other in active if other[0][1] > first]
        for other in active:
            if all(a < d and c < b for (a, b), (c, d) in zip(box, other, strict=True)):
                return f"{show_box(other)} and {show_box(box)} overlap"
        active.append(box)
    missing = prod(shape) - filled
    return f"{missing} of {prod(shape)} elements have no source" if missing else None


@lru_cache(maxsize=4096)
def _is_covered(shape: Shape, boxes: tuple[Box, ...]) -> bool:
    return _count_covered(tuple(sorted(boxes))) == prod(shape)


def _count_covered(boxes: tuple[Box, ...]) -> int:
    """Elements in the union of boxes, by slabs between consecutive borders of the first axis."""
    if not boxes[0]:
        return 1
    borders = sorted({border for box in boxes for border in box[0]})
    total = 0
    for lo, hi in zip(borders, borders[1:], strict=False):
        inner = tuple(sorted({box[1:] for box in boxes if box[0][0] <= lo and hi <= box[0][1]}))
        total += (hi - lo) * _count_covered(inner) if inner else 0
    return total


def _scale_box(step: LoadStep) -> Box:
    assert step.coding is not None
    box = step.take
    if step.view is not None:  # heads are whole runs of rows
        height = step.view[1]
        box = ((box[0][0] * height, box[0][1] * height), box[2])
    return cell_box(box, step.coding.encoding.cell)


def _name_hole(shape: Shape, boxes: tuple[Box, ...]) -> str:
    """The first slice along some axis that no box reaches, for the message."""
    for axis, n in enumerate(shape):
        at = 0
        for lo, hi in sorted(box[axis] for box in boxes):
            if lo > at:
                break
            at = max(at, hi)
        else:
            if at == n:
                continue
        end = min((lo for lo, _ in (box[axis] for box in boxes) if lo > at), default=n)
        return f"nothing reads {at}:{end} of axis {axis}"
    return "nothing reads some of it"


def _sources_of_holes(plans: Sequence[Plan]) -> set[str]:
    """What would be read, had its parameter not a hole elsewhere: the hole is the problem, not these."""
    holes = (param for plan in plans for param in plan.params if param.name not in plan.stored)
    return {part.source for param in holes for part in param.parts}


def _explain_unused(name: str, plan: Plan) -> str:
    weight, leaf = weight_of(name), name.rpartition(".")[2]
    if leaf in CHANGES:
        return f"{CHANGES[leaf]}: no parameter uses it, because that is not supported; get a conversion without it"
    if weight is None:
        where = plan.index.entries[name].file
        return f"is in {where}, but no parameter uses it and no rule ignores it: another model's config.json?"
    entries = plan.index.entries
    codes = find_codes(weight, entries)
    if codes is None and leaf not in STORED_LEAVES:
        return f"stands without its weight, {weight}, which is not in the checkpoint: another model's config.json?"
    if codes is None:
        return "is a scale without its weight: get the shard that has the weight"
    if name.removeprefix(weight) in CODE_SUFFIXES:
        return f"holds codes of a matrix that {codes.name} holds too: stored twice?"
    if codes.dtype in PLAIN:
        return f"is a scale, but its weight is stored as {codes.dtype}, which needs none: a broken conversion?"
    coding = find_coding(weight, entries)
    made_of = f" ({', '.join(coding.partners)})" if isinstance(coding, Coding) else ""
    return f"stands beside {codes.dtype} codes that do not need it{made_of}: stored twice, or a broken conversion?"
