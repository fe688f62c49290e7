"""One parameter of a plan in full: what it is held in, and from which bytes of which files it is made.

Asked about a checkpoint tensor instead, it says where that goes. Looks at Plans and nothing else.
"""

import re

from saccade.base.near import MOST_NEAR, ask, count_edits, find_near
from saccade.base.printable import shorten
from saccade.checkpoint.encoding import WHOLE
from saccade.checkpoint.index import Entry
from saccade.errors import PlanError
from saccade.models.parameters import Param
from saccade.plan.fold import fold
from saccade.plan.names import find_root, name_in_family
from saccade.plan.show import DEVICE_SUFFIXES, show_bytes, show_held, show_slice
from saccade.plan.types import LoadStep, Plan

NAME_SHOWN = 300  # characters
PARTS_SHOWN = 4  # 256 experts make 512 parts, all alike

OPS = {
    "copy": "copied as it is",
    "widen": "widened to {held}, exactly",
    "round": "rounded to {held}",
    "dequantize": "dequantised to {held}, codes times scale: exact if the scale is a power of two, else rounded once",
}


def explain(plan: Plan, name: str) -> str:
    """What becomes of `name`, a parameter or a checkpoint tensor. PlanError, with near names, if it is neither."""
    asked = name_in_family(name, find_root(plan.config, plan.index.entries))
    param = next((p for p in plan.params if asked in (p.name, p.name + ".weight", *partners(p.name))), None)
    if param is not None:
        return _explain_parameter(plan, param)
    if name not in plan.index.entries and name + ".weight" in plan.index.entries:
        name += ".weight"
    if name in plan.index.entries:
        return _explain_tensor(plan, name)
    known = [p.name for p in plan.params] + list(plan.index.entries)
    cure = ask(_find_near(name, known)) or "; `saccade plan --full` lists them"
    raise PlanError(f"{shorten(name, NAME_SHOWN)} is neither a parameter nor a tensor of {plan.index.title}{cure}")


def _explain_parameter(plan: Plan, param: Param) -> str:
    stored = plan.stored.get(param.name)
    scales = [plan.stored[name] for name in partners(param.name) if name in plan.stored]
    if stored is None:
        wanted = "\n".join(f"  {part.source} {list(part.shape)}" for part in param.parts[:PARTS_SHOWN])
        return f"{param.name}\n  cannot be made: see `saccade check`. Needs\n{wanted}"
    nbytes = stored.nbytes + sum(scale.nbytes for scale in scales)
    lines = [
        param.name,
        f"  held as {show_held(plan, param)} {list(stored.shape)}, {nbytes:,} bytes ({show_bytes(nbytes)})",
    ]
    lines += [f"  with scales {scale.dtype} {list(scale.shape)} in {scale.name}" for scale in scales]
    steps = [s for s in plan.steps if s.target == stored.name]
    beside = [[s for s in plan.steps if s.target == scale.name] for scale in scales]
    lines.append(f"  made of {len(steps)} part{'s' if len(steps) > 1 else ''}")
    for i, step in enumerate(steps[:PARTS_SHOWN]):
        lines += ["", *_explain_step(plan, step)]
        for others in beside:
            lines += _explain_step(plan, others[i])
    if len(steps) > PARTS_SHOWN:
        lines += ["", f"  and {len(steps) - PARTS_SHOWN} more, in order:"]
        lines += [f"    {text}" for text in fold(s.source for s in steps[PARTS_SHOWN:])]
    return "\n".join(lines)


def _explain_tensor(plan: Plan, name: str) -> str:
    entry = plan.index.entries[name]
    lines = [name, f"  {_describe(entry)}"]
    reason = next((i.reason for i in plan.ignored if i.name == name), None)
    if reason is not None:
        return "\n".join([*lines, f"  is not read: {reason}"])
    if name in plan.zeros:
        return "\n".join([*lines, "  must hold zeros: the codes beside it are read as symmetric"])
    steps = [step for step in plan.steps if name in (step.source, *_scales_of(step))]
    weights = dict.fromkeys(s.source for s in steps if name in _scales_of(s))
    lines += [f"  is the scale of {weight}" for weight in weights]
    for step in steps:
        lines += ["", *_explain_step(plan, step)]
    if not steps:
        elsewhere = "this rank has no use for it" if plan.layout.tp > 1 else "no parameter uses it: see `saccade check`"
        lines.append(f"  is not read: {elsewhere}")
    return "\n".join(lines)


def _explain_step(plan: Plan, step: LoadStep) -> list[str]:
    """Target and source boxes, what is done, and where the bytes are."""
    entries, stored = plan.index.entries, plan.stored[step.target]
    entry = entries[step.source]
    shape = step.coding.shape if step.coding else entry.shape
    view = f" seen as {list(step.view)}" if step.view else ""
    lines = [
        f"  {step.target}{show_slice(step.put, stored.shape)}",
        f"    from  {step.source}{view}{show_slice(step.take, step.view or shape)}",
        f"          {_describe(entry)}",
    ]
    if step.coding is not None:
        height, width = ("all" if g == WHOLE else g for g in step.coding.encoding.group)
        lines.append(f"    scale {step.coding.scale}, one for {height}x{width} numbers")
        lines.append(f"          {_describe(entries[step.coding.scale])}")
    if step.coding is not None and step.coding.global_scale is not None:
        verb = "divides" if step.coding.encoding.divides else "multiplies"
        lines.append(f"    and   {step.coding.global_scale}, which {verb} all of them")
        lines.append(f"          {_describe(entries[step.coding.global_scale])}")
    lines.append(f"    {OPS[step.op].format(held=stored.dtype)}")
    return lines


def partners(name: str) -> list[str]:
    """What stands beside the codes of a parameter on the device."""
    return [name + leaf for leaf in DEVICE_SUFFIXES[1:]]


def _scales_of(step: LoadStep) -> tuple[str, ...]:
    return step.coding.partners if step.coding else ()


def _describe(entry: Entry) -> str:
    return f"{entry.dtype} {list(entry.shape)} in {entry.file}, bytes {entry.start:,} to {entry.stop:,}"


def _find_near(name: str, known: list[str]) -> list[str]:
    """Names a slip away in each of their parts, and of the same layer and expert: another number is another parameter.
    Else those that end with `name` or begin with it, if they are few."""
    numbers = re.findall(r"\d+", name)
    same = [k for k in known if abs(len(k) - len(name)) <= 3 and re.findall(r"\d+", k) == numbers]
    near = find_near(name, (k for k in same if k.count(".") != name.count(".") or _is_near_by_parts(name, k)))
    longer = near or [k for k in known if k.endswith("." + name) or k.startswith(name + ".")]
    return longer if len(longer) <= MOST_NEAR else []


def _is_near_by_parts(name: str, other: str) -> bool:
    """Whether no part between dots is another word: the long names have most of their letters in common."""
    pairs = zip(name.split("."), other.split("."), strict=True)
    return all(a == b or find_near(a, [b]) or count_edits(a, b, 1) == 1 for a, b in pairs)
