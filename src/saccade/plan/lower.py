"""Parameters + file headers -> steps.

The file decides: dtype and shape of every tensor come from its header. Shapes are checked twice, against the config
and, for codes, against their scale. Casts are a closed table, so FP8 codes can never be copied into a float parameter.
It reads no tensor byte and knows no torch. What it finds wrong it returns as Problems; check.py proves the rest.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple

from saccade.checkpoint.coding import Coding, explain_shape, find_codes, find_coding
from saccade.checkpoint.encoding import WHOLE
from saccade.checkpoint.index import Entry, Index
from saccade.checkpoint.leftovers import LEFTOVER_LEAVES, find_leftover
from saccade.config.file import Config
from saccade.errors import Problem
from saccade.models.parameters import Extras, Kind, Layout, Param, Part, Shape
from saccade.plan.keep import Cells, find_cells, keep
from saccade.plan.names import find_layer_prefix, find_root, list_parameters, list_unused, name_in_family, name_in_files
from saccade.plan.types import DTYPE_BYTES, Ignored, LoadStep, Plan, Stored, show_box

# (stored, held) -> op. What is not here is refused. Codes have one op, "dequantize", and only with their scale.
CASTS = {
    ("BF16", "BF16"): "copy",
    ("F32", "F32"): "copy",
    ("BF16", "F32"): "widen",
    ("F16", "F32"): "widen",
    ("F32", "BF16"): "round",
    ("F16", "BF16"): "round",
}


class Found(NamedTuple):
    """A tensor of the checkpoint, and what its numbers are made of if they are codes."""

    entry: Entry
    coding: Coding | None


class Sources:
    """The matrices that parts name, each looked up and judged once, for however many parts and ranks."""

    def __init__(self, index: Index):
        self.index = index
        self.entries = index.entries
        self._found: dict[str, Found | Problem] = {}

    def find(self, part: Part) -> Found | Problem:
        """The part's tensor and how it is stored, or what is wrong with it."""
        found = self._found.get(part.source)
        if found is None:
            found = self._found[part.source] = self._judge(part)
        return found

    def _judge(self, part: Part) -> Found | Problem:
        coding = find_coding(part.source, self.entries, part.shape)
        if isinstance(coding, Problem):
            return coding
        if coding is not None:
            return Found(self.entries[coding.codes], coding)
        entry = self.entries[part.source]
        return Found(entry, None) if entry.shape == part.shape else explain_shape(entry, part.shape)


def lower(
    params: Iterable[Param],
    config: Config,
    sources: Sources,
    layout: Layout,
    dtype: str,
    mtp: bool,
    notes: tuple[str, ...],
) -> Plan:
    """The flat plan of one rank. `dtype` is "auto" or "float32"."""
    work = _Lowering(sources, dtype)
    params = tuple(params)
    for param in params:
        work.add(param)
    return Plan(
        config=config,
        index=sources.index,
        layout=layout,
        dtype=dtype,
        mtp=mtp,
        params=params,
        stored=work.stored,
        steps=tuple(work.steps),
        ignored=ignore(config, sources.index, mtp),
        zeros=tuple(work.zeros),
        problems=tuple(work.problems.values()),
        notes=notes + tuple(work.notes),
    )


@dataclass
class _Lowering:
    sources: Sources
    dtype: str
    stored: dict[str, Stored] = field(default_factory=dict)
    steps: list[LoadStep] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    zeros: dict[str, None] = field(default_factory=dict)
    problems: dict[tuple[str, str], Problem] = field(default_factory=dict)  # w_uk and w_uv share a source: keep one

    def add(self, param: Param) -> None:
        found: list[Found] = []
        for part in param.parts:
            source = self.sources.find(part)
            if isinstance(source, Problem):
                self.problems[source.kind, source.name] = source
            elif param.kind is Kind.F32_ONLY and source.entry.dtype != "F32":
                problem = explain_rounded(source.entry)
                self.problems[problem.kind, problem.name] = problem
            else:
                found.append(source)
        if len(found) < len(param.parts):
            return  # a parameter with a hole gets no steps
        self.zeros.update((coding.offset, None) for _, coding in found if coding is not None and coding.offset)
        cells = self.find_kept(param, found)
        if cells is not None:
            codings = [coding for _, coding in found if coding is not None]
            stored, steps = keep(param, codings, cells, self.sources.entries)
            self.stored.update((s.name, s) for s in stored)
            self.steps += steps
            return
        held = self.hold(param, found)
        self.stored[param.name] = Stored(param.name, held, param.shape)
        for part, (entry, coding) in zip(param.parts, found, strict=True):
            op = CASTS[entry.dtype, held] if coding is None else "dequantize"
            self.steps.append(LoadStep(param.name, part.put, op, entry.name, part.take, part.view, coding))

    def hold(self, param: Param, found: list[Found]) -> str:
        """What a parameter that is not kept as codes is held in (the dtype table of the design)."""
        if self.dtype == "float32" or param.kind in (Kind.F32, Kind.F32_ONLY):
            return "F32"
        is_wide = param.kind is Kind.ROUTER and any(entry.dtype != "BF16" for entry, _ in found)
        return "F32" if is_wide else "BF16"

    def find_kept(self, param: Param, found: list[Found]) -> Cells | None:
        """How the parameter's scales lie if it stays in the codes of its file (the dtype table of the design). If it
        could, but for how it is cut or stored, a note says what that costs."""
        codings = [coding for _, coding in found if coding is not None]
        is_free = param.kind is Kind.EXPERTS or any(c.encoding.is_dense for c in codings)
        if self.dtype == "float32" or param.kind not in (Kind.LINEAR, Kind.EXPERTS) or not codings or not is_free:
            return None
        encoding, entries = codings[0].encoding, self.sources.entries
        if len(codings) < len(found) or any(c.encoding is not encoding for c in codings):
            names = sorted({entry.dtype if c is None else c.encoding.name for entry, c in found})
            why = f"its parts are stored in several ways ({', '.join(names)})"
        elif encoding.scale_held is None and len({entries[c.scale].dtype for c in codings}) > 1:
            why = "its scales are stored in several dtypes"
        else:
            cells = find_cells(param, encoding)
            if isinstance(cells, Cells):
                return cells
            box = "x".join("whole" if g == WHOLE else str(g) for g in encoding.group)
            why = f"{cells.source} {list(cells.shape)} goes from {show_box(cells.take)} to {show_box(cells.put)}"
            why += f", off the borders of its {box} blocks"
        kept_bits = 0
        for part, (entry, coding) in zip(param.parts, found, strict=True):
            bits = 8 * DTYPE_BYTES[entry.dtype] // (1 if coding is None else coding.encoding.packed)
            kept_bits += prod(hi - lo for lo, hi in part.put) * min(bits, 16)
        self.notes.append(f"{param.name} is held in BF16, +{2 * prod(param.shape) - kept_bits // 8} bytes: {why}")
        return None


def explain_rounded(entry: Entry) -> Problem:
    """A tensor that is only right in F32 was stored in less."""
    text = f"is stored as {entry.dtype}, expected F32: it was rounded, and what is computed of it magnifies the error"
    return Problem("dtype", entry.name, f"{text}; get a checkpoint that keeps it in F32")


def find_extras(c: Config, index: Index, mtp: bool) -> tuple[Extras, tuple[str, ...]]:
    """What the checkpoint ships beyond the necessary, and a note where config and file disagree."""
    x = find_layer_prefix(c, index.entries, c.num_hidden_layers)
    there = [name for name in index.entries if name.startswith(x)]
    shipped = bool(find_leftovers(c, index, there).keys() ^ there)  # cache scales may be left of a layer that is not
    if not mtp:
        return Extras(), ()
    if not shipped:
        note = f"config.json declares an MTP layer ({x}*), the checkpoint has none: no drafting"
        return Extras(), (note,) if c.num_nextn_predict_layers else ()
    extras = Extras(True, x + "embed_tokens.weight" in index.entries, x + "shared_head.head.weight" in index.entries)
    absent = [name for name, has in (("embedding", extras.mtp_embed), ("head", extras.mtp_head)) if not has]
    return extras, (f"the MTP layer uses the main {' and '.join(absent)}",) if absent else ()


def find_shapes(c: Config, index: Index) -> dict[str, Shape]:
    """What the config says of every matrix and vector that the whole model reads. Codes alone do not tell: in INT4,
    [64, 128] numbers are stored in the shape of [64, 64] in INT8."""
    root, (extras, _) = find_root(c, index.entries), find_extras(c, index, True)
    return {part.source: part.shape for param in list_parameters(c, root, Layout(), extras) for part in param.parts}


def ignore(c: Config, index: Index, mtp: bool) -> tuple[Ignored, ...]:
    """Tensors that are rightly not read, each with its reason. Every rule comes from the config or the caller."""
    reasons, root = {}, find_root(c, index.entries)
    if not mtp:
        reasons[f"{root}layers.{c.num_hidden_layers}."] = "the MTP layer was not asked for (mtp=False)"
    reasons |= list_unused(c, root)
    prefixes, leftovers = tuple(reasons), find_leftovers(c, index)
    ignored = []
    for name in index.entries:
        if prefixes and name.startswith(prefixes):
            ignored.append(Ignored(name, next(reason for p, reason in reasons.items() if name.startswith(p))))
        elif name in leftovers:
            ignored.append(Ignored(name, leftovers[name]))
    return tuple(ignored)


def find_leftovers(c: Config, index: Index, names: Iterable[str] | None = None) -> dict[str, str]:
    """What quantisers left beside the model and nothing here reads, by name: why that is right (leftovers.py). Of all
    tensors, or of those of the given names."""
    entries, layers, root = index.entries, c.num_hidden_layers + 1, find_root(c, index.entries)

    def has(matrix: str) -> bool:
        return find_codes(name_in_files(matrix, root), entries) is not None

    found = {}
    for name in entries if names is None else names:
        if name.rpartition(".")[2] in LEFTOVER_LEAVES:
            reason = find_leftover(name_in_family(name, root), entries[name].shape, layers, has)
            if reason is not None:
                found[name] = reason
    return found
