"""The proof that a plan is complete, before any tensor byte is read.

Tiling: the steps of each stored tensor cover it exactly once: in bounds, no overlap, no hole. Consumption: over all
ranks, every element of every checkpoint tensor is read, or ignored for a stated reason, never both. All problems
are returned, none raised: a person mends ten at once more easily than one by one.
"""

from collections.abc import Sequence
from functools import lru_cache
from math import prod

from saccade.checkpoint.encoding import PLAIN, Encoding, find_encoding, weight_of
from saccade.errors import Problem
from saccade.plan.lower import CASTS, block_box
from saccade.plan.types import Box, Plan, Shape, Step, spell


def check(plan: Plan) -> list[Problem]:
    """What is wrong with one rank's plan and the checkpoint behind it; [] is the proof that it tiles, by allowed casts,
    with every code and its own scale."""
    problems = [*plan.index.problems, *plan.problems]
    entries, stored = plan.index.entries, plan.stored
    placed: dict[str, list[tuple[Box, str]]] = {name: [] for name in stored}
    for step in plan.steps:
        target, put, op, source, take, view, _, _ = step  # unpacked: 119,000 steps of GLM-5 take 0.1 s less
        held, entry = stored.get(target), entries.get(source)
        if held is None or entry is None:
            name, role = (target, "target") if held is None else (source, "source")
            problems.append(Problem("step", name, f"is the {role} of a step, but does not exist"))
            continue
        placed[target].append((put, source))
        fault = find_step_fault(op, entry.dtype, held.dtype, entry.shape, view, take, put)
        if fault is None and op == "dequantize":
            fault = find_scale_fault(step, plan)
        if fault:
            problems.append(Problem("step", target, f"{op} of {source} {spell(take)}: {fault}"))
    for name, held in stored.items():
        fault = find_tiling_fault(held.shape, tuple([put for put, _ in placed[name]]))
        if fault:
            problems.append(Problem("tiling", name, f"{list(held.shape)} is not filled exactly once: {fault}"))
        if held.group is not None:
            scales = placed.get(name + ".scale", [])
            if [source for _, source in placed[name]] != [weight_of(scale) for _, scale in scales]:
                problems.append(Problem("step", name, "its codes and its scales come from different tensors"))
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
    return None if sides == placed else f"goes to {spell(put)}: sizes differ"


def find_scale_fault(step: Step, plan: Plan) -> str | None:
    """Whether codes are multiplied by their own scale, in the groups of their format."""
    entries = plan.index.entries
    encoding = find_encoding(entries[step.source], entries)
    if not isinstance(encoding, Encoding):
        return "its source holds no codes with a scale"
    if step.scale != step.source + encoding.suffix or step.group != encoding.group:
        return f"{step.scale} by {step.group} is not the scale of {encoding.name} codes in {step.source}"
    return None


def check_sources(plans: Sequence[Plan]) -> list[Problem]:
    """Which checkpoint tensors are not wholly read by the given ranks together, nor ignored."""
    index = plans[0].index
    reads: dict[str, tuple[Box, ...]] = {}  # distinct boxes: replicas read the same
    views: dict[str, Shape] = {}
    for plan in plans:
        for step in plan.steps:
            _, _, _, source, take, view, scale, _ = step
            boxes = reads.get(source)
            if boxes is None:
                reads[source] = (take,)
            elif take not in boxes:
                reads[source] = (*boxes, take)
            if view is not None:
                views[source] = view
            if scale is not None:
                box = _scale_box(step)
                if box not in reads.get(scale, ()):
                    reads[scale] = (*reads.get(scale, ()), box)
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


@lru_cache(maxsize=1024)  # layers repeat: 1,665 parameters of DeepSeek-V3.2 are tiled in 25 ways
def find_tiling_fault(shape: Shape, boxes: tuple[Box, ...]) -> str | None:
    """Why boxes do not tile [0, shape) exactly once, or None if they do."""
    ordered = sorted(boxes)
    filled = 0
    for box in ordered:
        if len(box) != len(shape) or any(lo < 0 or hi > n or lo >= hi for (lo, hi), n in zip(box, shape, strict=True)):
            return f"{spell(box)} is out of bounds"
        filled += prod([hi - lo for lo, hi in box])
    # Sorted by first row, only boxes whose rows still reach into the next one's can overlap it: for 256 stacked
    # experts that is two at a time.
    active: list[Box] = []
    for box in ordered:
        first = box[0][0]
        active = [other for other in active if other[0][1] > first]
        for other in active:
            if all(a < d and c < b for (a, b), (c, d) in zip(box, other, strict=True)):
                return f"{spell(other)} and {spell(box)} overlap"
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


def _scale_box(step: Step) -> Box:
    assert step.group is not None
    box = step.take
    if step.view is not None:  # heads are whole runs of rows
        height = step.view[1]
        box = ((box[0][0] * height, box[0][1] * height), box[2])
    return block_box(box, step.group)


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
    weight = weight_of(name)
    if weight is not None:
        entry = plan.index.entries.get(weight)
        if entry is None:
            return "is a scale without its weight: get the shard that has the weight"
        return f"is a scale, but its weight is stored as {entry.dtype}, which needs none: a broken conversion?"
    return "is in the checkpoint, but no parameter uses it and no rule ignores it: another model's config.json?"
