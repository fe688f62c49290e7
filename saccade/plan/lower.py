"""Parameters + file headers -> steps.

The file decides: dtype and shape of every tensor come from its header. Shapes are checked twice, against the config
and, for codes, against their scale. Casts are a closed table, so FP8 codes can never be copied into a float parameter.
It reads no tensor byte and knows no torch. What it finds wrong it returns as Problems; check.py proves the rest.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod
from typing import NamedTuple

from saccade.checkpoint.encoding import Encoding, find_encoding
from saccade.checkpoint.index import Entry, Index
from saccade.config import ModelConfig
from saccade.errors import Problem
from saccade.plan.table import Extras
from saccade.plan.types import BYTES, Box, Ignored, Kind, Layout, Param, Part, Plan, Shape, Step, Stored, spell

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
    """A tensor of the checkpoint, and its row of the table of encodings if its numbers are codes."""

    entry: Entry
    encoding: Encoding | None


class Sources:
    """The tensors that parts name, each looked up and judged once, for however many parts and ranks."""

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
        entry = self.entries.get(part.source)
        if entry is None:
            return Problem("missing", part.source, f"is not in the checkpoint (expected shape {list(part.shape)})")
        if entry.shape != part.shape:
            cure = (
                "transposed?"
                if entry.shape == part.shape[::-1] and len(entry.shape) == 2
                else "another model's config?"
            )
            text = f"has shape {list(entry.shape)}, config.json says {list(part.shape)} ({cure})"
            return Problem("shape", part.source, text)
        encoding = find_encoding(entry, self.entries)
        return encoding if isinstance(encoding, Problem) else Found(entry, encoding)


def lower(
    params: Iterable[Param],
    config: ModelConfig,
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
        problems=tuple(work.problems.values()),
        notes=notes + tuple(work.notes),
    )


@dataclass
class _Lowering:
    sources: Sources
    dtype: str
    stored: dict[str, Stored] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: dict[tuple[str, str], Problem] = field(default_factory=dict)  # w_uk and w_uv share a source: keep one

    def add(self, param: Param) -> None:
        found: list[Found] = []
        for part in param.parts:
            source = self.sources.find(part)
            if isinstance(source, Problem):
                self.problems[source.kind, source.name] = source
            else:
                found.append(source)
        if len(found) < len(param.parts):
            return  # a parameter with a hole gets no steps
        held, encoding = self.hold(param, found)
        self.stored[param.name] = Stored(param.name, held, param.shape, None if encoding is None else encoding.group)
        if encoding is not None:
            self.keep(param, encoding)
            return
        for part, (entry, code) in zip(param.parts, found, strict=True):
            if code is None:
                op, scale, group = CASTS[entry.dtype, held], None, None
            else:
                op, scale, group = "dequantize", part.source + code.suffix, code.group
            self.steps.append(Step(param.name, part.put, op, part.source, part.take, part.view, scale, group))

    def hold(self, param: Param, found: list[Found]) -> tuple[str, Encoding | None]:
        """What the parameter is held in (the dtype table of the design), and the encoding it is kept in, if any."""
        if self.dtype == "float32" or param.kind is Kind.F32:
            return "F32", None
        if param.kind is Kind.ROUTER:
            return ("BF16" if all(f.entry.dtype == "BF16" for f in found) else "F32"), None
        encoding = found[0].encoding
        if param.kind is Kind.BF16 or encoding is None or any(f.encoding is not encoding for f in found):
            return "BF16", None
        cut = next((p for p in param.parts if not _keeps_blocks(p.take, p.put, p.shape, encoding.group)), None)
        if cut is None:
            return encoding.codes, encoding
        more = prod(param.shape) * (BYTES["BF16"] - BYTES[encoding.codes])
        self.notes.append(
            f"{param.name} is held in BF16, +{more} bytes: {cut.source} {list(cut.shape)} goes from {spell(cut.take)}"
            f" to {spell(cut.put)}, off the borders of its {encoding.group[0]}x{encoding.group[1]} blocks"
        )
        return "BF16", None

    def keep(self, param: Param, encoding: Encoding) -> None:
        """Codes and scales as they are: two stored tensors, two independent copies."""
        shape = param.shape[:-2] + encoding.scale_shape(param.shape[-2:])
        scales = Stored(param.name + ".scale", "F32", shape)
        self.stored[scales.name] = scales
        name, steps, group, entries = param.name, self.steps, encoding.group, self.sources.entries
        for source, _, take, put, _ in param.parts:
            steps.append(Step(name, put, "copy", source, take, None, None, None))
            source += encoding.suffix
            op = "copy" if entries[source].dtype == "F32" else "widen"  # E8M0 -> F32 is exact
            steps.append(Step(scales.name, block_box(put, group), op, source, block_box(take, group), None, None, None))


@lru_cache(maxsize=4096)
def block_box(box: Box, group: tuple[int, int]) -> Box:
    """The blocks that a box of numbers touches; leading axes (experts) stay as they are."""
    tail = tuple((lo // g, -(-hi // g)) for (lo, hi), g in zip(box[-2:], group, strict=True))
    return box[:-2] + tail


@lru_cache(maxsize=4096)
def _keeps_blocks(take: Box, put: Box, shape: Shape, group: tuple[int, int]) -> bool:
    """Whether blocks stay whole blocks: cuts on block borders, or at the source's own ragged end."""
    return all(
        lo % g == 0 and top % g == 0 and (hi % g == 0 or hi == n)
        for (lo, hi), (top, _), n, g in zip(take, put[-2:], shape, group, strict=True)
    )


def find_extras(c: ModelConfig, index: Index, mtp: bool) -> tuple[Extras, tuple[str, ...]]:
    """What the checkpoint ships beyond the necessary, and a note where config and file disagree."""
    x = f"model.layers.{c.num_hidden_layers}."
    shipped = any(name.startswith(x) for name in index.entries)
    if not mtp:
        return Extras(), ()
    if not shipped:
        note = f"config.json declares an MTP layer ({x}*), the checkpoint has none: no drafting"
        return Extras(), (note,) if c.num_nextn_predict_layers else ()
    extras = Extras(True, x + "embed_tokens.weight" in index.entries, x + "shared_head.head.weight" in index.entries)
    absent = [name for name, has in (("embedding", extras.mtp_embed), ("head", extras.mtp_head)) if not has]
    return extras, (f"the MTP layer uses the main {' and '.join(absent)}",) if absent else ()


def ignore(c: ModelConfig, index: Index, mtp: bool) -> tuple[Ignored, ...]:
    """Tensors that are rightly not read, each with its reason. Every rule comes from the config or the caller."""
    reasons = {}
    if not mtp:
        reasons[f"model.layers.{c.num_hidden_layers}."] = "the MTP layer was not asked for (mtp=False)"
    for layer in range(c.num_hidden_layers):
        if not c.has_indexer(layer):
            reasons[f"model.layers.{layer}.self_attn.indexer."] = (
                "the layer reuses an earlier selection (indexer_types)"
            )
    prefixes = tuple(reasons)
    ignored = []
    for name in index.entries:
        if name.endswith(".rotary_emb.inv_freq"):
            ignored.append(Ignored(name, "rotary frequencies follow from config.json"))
        elif prefixes and name.startswith(prefixes):
            ignored.append(Ignored(name, next(reason for p, reason in reasons.items() if name.startswith(p))))
    return tuple(ignored)
