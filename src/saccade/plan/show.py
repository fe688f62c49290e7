"""Print a plan so that a person can read all of it: 92,425 tensors in less than forty lines.

Parameters that differ only in their layer, and tensors that differ only in their expert, fold to one line; what is
printed stands for exactly what is in the plan. Looks at Plans and nothing else. One parameter in detail: explain.py;
what is wrong with a plan: problems.py.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from os.path import commonprefix
from typing import Any, NamedTuple

from saccade.base.values import show_count
from saccade.checkpoint.encoding import weight_of
from saccade.models.cache_rows import CACHE_NUMBERS, EXPANDED_BYTES, count_state_bytes, count_token_bytes
from saccade.models.parameters import Box, Param, Shape
from saccade.models.registry import find_cache_rows
from saccade.plan.fold import cut_lines, fold, fold_lines, fold_prose, split
from saccade.plan.names import find_root, name_in_files
from saccade.plan.problems import PROBLEM_LINES
from saccade.plan.reads import count_needed_bytes, count_read_bytes, count_waiting_bytes
from saccade.plan.types import LoadStep, Plan

NAME_LINES = 100  # of ignored tensors with one reason
DEVICE_SUFFIXES = ("", ".scale", ".global_scale")  # what a parameter is on the device


class TableRow(NamedTuple):
    """One line of the table; all its parameters are alike but for the numbers in their names."""

    name: str
    shape: str
    held: str
    nbytes: int
    parts: str


def show_plan(
    plan: Plan, full: bool = False, index_cache: str = "bf16", ranks: Sequence[int] = (), latent_cache: str = "bf16"
) -> str:
    """The table of parameters, folded unless `full`, then totals, what is ignored, and notes. `ranks`: bytes on the
    device of each rank, if more is to be said than this one's."""
    rows = list(list_rows(plan, full))
    header = ("parameter", "shape", "held as", "bytes", "made of")
    cells = [header, *((r.name, r.shape, r.held, show_bytes(r.nbytes), r.parts) for r in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(4)]
    lines: list[str] = []
    for name, shape, held, nbytes, parts in cells:
        line = f"{name:{widths[0]}}  {shape:{widths[1]}}  {held:{widths[2]}}  {nbytes:>{widths[3]}}  {parts}"
        lines.append(line.rstrip())
    return "\n".join([*lines, "", *_totals(plan, index_cache, latent_cache, ranks)])


def plan_json(plan: Plan) -> dict[str, Any]:
    """The whole plan as JSON data, nothing folded. Keys:

    format: 1; a change of meaning raises it.
    root, model_type, dtype, mtp, layout {tp, ep, rank}: what was planned.
    tensors, file_bytes: how many tensors the headers name, and their bytes.
    device_bytes, read_bytes, needed_bytes, waiting_bytes: of this rank, see `show_plan`.
    cache_token_bytes: of the cache, over all layers, with index keys kept as "bf16" (F32 in "float32") and as "fp8".
    fp8_latents_token_bytes: the same with latents kept as "fp8".
    state_bytes: of one request's states, over all layers.
    parameters: name, dtype, shape, bytes and steps of each tensor on the device, in order; codes and their scales are
        two. A step: op, source, take and put (one [first, last + 1] per axis), view (the shape in which take counts,
        or null), scale (a tensor, or null), group (rows and columns that share a scale, or null), global_scale (a
        tensor, or null), encoding (of the source, if the step decodes it, or null).
    zeros: tensors that must hold zeros, and are read to see that they do.
    sources: of each tensor that a step names: dtype, shape, file, start and stop (bytes in that file).
    ignored: name and reason. problems: kind, name and text. notes: texts.
    """
    entries = plan.index.entries
    steps: dict[str, list[LoadStep]] = defaultdict(list)
    for step in plan.steps:
        steps[step.target].append(step)
    used = {name: None for step in plan.steps for name in (step.source, *(step.coding.partners if step.coding else ()))}
    used |= dict.fromkeys(plan.zeros)
    return {
        "format": 1,
        "root": plan.index.root,
        "model_type": plan.config.model_type,
        "dtype": plan.dtype,
        "mtp": plan.mtp,
        "layout": plan.layout._asdict(),
        "tensors": len(entries),
        "file_bytes": _count_file_bytes(plan),
        "device_bytes": plan.device_bytes,
        "read_bytes": count_read_bytes(plan),
        "needed_bytes": count_needed_bytes(plan),
        "waiting_bytes": count_waiting_bytes(plan),
        "cache_token_bytes": {how: _count_token_bytes(plan, how) for how in CACHE_NUMBERS},
        "fp8_latents_token_bytes": {how: _count_token_bytes(plan, how, "fp8") for how in CACHE_NUMBERS},
        "state_bytes": count_state_bytes(find_cache_rows(plan.config, plan.has_mtp, plan.layout)),
        "parameters": [
            {
                "name": stored.name,
                "dtype": stored.dtype,
                "shape": stored.shape,
                "bytes": stored.nbytes,
                "steps": [_step_json(step) for step in steps[stored.name]],
            }
            for stored in plan.stored.values()
        ],
        "sources": {name: dict(list(entries[name]._asdict().items())[1:]) for name in used},
        "zeros": list(plan.zeros),
        "ignored": [i._asdict() for i in plan.ignored],
        "problems": [p._asdict() for p in (*plan.index.problems, *plan.problems)],
        "notes": list(plan.notes),
    }


def _step_json(step: LoadStep) -> dict[str, Any]:
    coding = step.coding
    return {
        **{key: getattr(step, key) for key in ("op", "source", "take", "put", "view")},
        "scale": coding and coding.scale,
        "group": coding and coding.encoding.group,
        "global_scale": coding and coding.global_scale,
        "encoding": coding and coding.encoding.name,
    }


def show_bytes(n: int) -> str:
    """1,234 bytes are `1.23 kB`: three digits, decimal units."""
    value, unit = float(n), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{n} B" if unit == "B" else f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f} {unit}"


def show_held(plan: Plan, param: Param) -> str:
    """`BF16`, or the encoding that it is kept in."""
    stored = plan.stored.get(param.name)
    if stored is None:
        return "nothing"  # a source is missing or wrong; the problem names it
    return stored.dtype if stored.encoding is None else stored.encoding.name


def show_slice(take: Box, shape: Shape) -> str:
    """Which part of a tensor is taken, in Python's spelling; nothing if all of it."""
    spans = [":" if (lo, hi) == (0, n) else f"{lo}:{hi}" for (lo, hi), n in zip(take, shape, strict=True)]
    while spans and spans[-1] == ":":
        spans.pop()
    return f"[{', '.join(spans)}]" if spans else ""


def list_rows(plan: Plan, full: bool = False) -> Iterable[TableRow]:
    """The lines of the table; their bytes add up to the bytes on the device."""
    steps: dict[str, list[LoadStep]] = defaultdict(list)
    for step in plan.steps:
        steps[step.target].append(step)
    alike: dict[tuple[object, ...], list[Param]] = {}
    root = find_root(plan.config, plan.index.entries)
    for param in plan.params:
        alike.setdefault(_likeness(plan, param, steps[param.name], root), []).append(param)
    for params in alike.values():
        first = params[0]
        held, parts = show_held(plan, first), _show_parts(plan, first, steps[first.name], root)
        nbytes = sum(
            plan.stored[first.name + leaf].nbytes for leaf in DEVICE_SUFFIXES if first.name + leaf in plan.stored
        )
        shape = "[" + ", ".join(map(str, first.shape)) + "]"
        lines = (
            [(p.name, 1) for p in params]
            if full
            else [(f.text, len(f.members)) for f in fold_lines(p.name for p in params)]
        )
        for name, count in lines:
            yield TableRow(name, shape, held, nbytes * count, parts)


def _likeness(plan: Plan, param: Param, steps: Sequence[LoadStep], root: str) -> tuple[object, ...]:
    """Equal for parameters that may share a row: everything that the row says, before it is spelled out. This is the
    inner loop (512 steps for each layer's experts), so it spells nothing."""
    entries = plan.index.entries
    stored = plan.stored.get(param.name)
    held = stored and (stored.dtype, stored.shape, stored.encoding, stored.group)
    cut = _count_shared(param, steps, root)
    made_of = tuple(
        (source[cut:], take, op, coding and coding.encoding, entries[source].dtype)
        for _, _, op, source, take, _, coding in steps
    )
    return split(param.name)[0], param.shape, held, made_of


def _count_shared(param: Param, steps: Sequence[LoadStep], root: str) -> int:
    """How many letters the names of a parameter and of all its sources have in common, up to a dot. `root`: see
    names.py."""
    sources = [s.source for s in steps]
    common = (
        commonprefix([name_in_files(param.name, root).removesuffix(".weight"), min(sources), max(sources)])
        if sources
        else ""
    )
    return common.rfind(".") + 1


def _show_parts(plan: Plan, param: Param, steps: Sequence[LoadStep], root: str) -> str:
    """`wk (FP8 128x128 -> BF16) | weights_proj (BF16)`"""
    if not steps:
        return "nothing: see the problems"
    entries, held = plan.index.entries, show_held(plan, param)
    cut = _count_shared(param, steps, root)
    alike: dict[tuple[str, str], list[str]] = {}
    for step in steps:
        entry = entries[step.source]
        coding, kept = step.coding, plan.stored[step.target].encoding
        encoding = coding.encoding if coding else kept
        stored = entry.dtype if encoding is None else encoding.name
        cast = stored if stored == held else f"{stored} -> {held}"
        name = (weight_of(step.source) or step.source)[cut:].removesuffix(".weight")
        shape = step.view or (coding.shape if coding else entry.shape)
        alike.setdefault((show_slice(step.take, shape), cast), []).append(name)
    parts = [(text + slice_, cast) for (slice_, cast), names in alike.items() for text in fold(names)]
    if len({cast for _, cast in parts}) == 1:
        return " | ".join(text for text, _ in parts) + f" ({parts[0][1]})"
    return " | ".join(f"{text} ({cast})" for text, cast in parts)


def _totals(plan: Plan, index_cache: str, latent_cache: str, ranks: Sequence[int]) -> list[str]:
    index, waiting = plan.index, show_bytes(count_waiting_bytes(plan))
    rank = _show_rank(plan)
    lines = [
        f"files    {show_count(len(index.entries), 'tensor')} in {show_count(len(index.files), 'file')},"
        f" {show_bytes(_count_file_bytes(plan))}",
        f"device   {show_device(plan, ranks)} (dtype {plan.dtype})",
        f"cache    {_show_cache(plan, index_cache, latent_cache)}",
        f"work     at most {show_bytes(EXPANDED_BYTES)} on a GPU: keys and values that a prompt's attention makes",
        f"read     {show_bytes(count_read_bytes(plan))}{rank}{_show_waste(plan)}",
        f"waiting  at most {waiting}, if scales are fed after their weights; none from files",
    ]
    reasons: dict[str, list[str]] = defaultdict(list)
    for name, reason in plan.ignored:
        reasons[reason].append(name)
    if plan.zeros:
        lines.append(f"zeros    {len(plan.zeros):,} offsets of codes, refused when loaded if one is not zero")
    for reason, names in reasons.items():
        lines.append(f"ignored  {len(names):,} tensors: {reason}")
        lines += [f"           {name}" for name in cut_lines(fold(names), NAME_LINES)]
    return lines + [f"note     {text}" for text in cut_lines(fold_prose(plan.notes), PROBLEM_LINES)]


def _show_waste(plan: Plan) -> str:
    """What of the bytes that are read is needed, where it is not all."""
    read, needed = count_read_bytes(plan), count_needed_bytes(plan)
    if needed >= read:
        return ""
    ratio = f"{read / max(1, needed):.2f} times"
    return f", {ratio} the {show_bytes(needed)} that it needs: rows of matrices are read whole"


def _show_rank(plan: Plan) -> str:
    return f" on rank {plan.layout.rank} of {plan.layout.tp}" if plan.layout.tp > 1 else ""


def show_device(plan: Plan, held: Sequence[int]) -> str:
    """The most that a rank holds, which is what devices must have; the range where ranks differ. `held`: bytes of each
    rank, or nothing: then those of this one."""
    mine = plan.device_bytes
    if len(held) < 2:
        return show_bytes(mine) + _show_rank(plan)
    most = max(held)
    if min(held) == most:
        return f"{show_bytes(most)} on each of {len(held)} ranks"
    text = f"{show_bytes(most)} on rank {held.index(most)}, the most of {len(held)} ranks"
    text += f" ({min(held):,} to {most:,} bytes"
    return text + (")" if mine == most else f"; {show_bytes(mine)} on rank {plan.layout.rank})")


def _count_token_bytes(plan: Plan, index_cache: str, latent_cache: str = "bf16") -> int:
    layers = find_cache_rows(plan.config, plan.has_mtp, plan.layout)
    return count_token_bytes(layers, plan.dtype, index_cache, latent_cache)


def _show_cache(plan: Plan, index_cache: str, latent_cache: str) -> str:
    number = "F32" if plan.dtype == "float32" else "BF16"
    size = show_bytes(_count_token_bytes(plan, index_cache, latent_cache))
    states = count_state_bytes(find_cache_rows(plan.config, plan.has_mtp, plan.layout))
    beside = f"; {show_bytes(states)} a request of states" if states else ""
    keys, latents = ("FP8" if how == "fp8" else number for how in (index_cache, latent_cache))
    return f"{size} a token, latents in {latents}, index keys in {keys}{beside}"


def _count_file_bytes(plan: Plan) -> int:
    return sum(entry.stop - entry.start for entry in plan.index.entries.values())
