"""What a conversion changes, as plain data: every tensor of the result, what it is made of, and where it will lie.

One file of the result for each file of the source; a file in which nothing changes is copied whole. All of it follows
from headers, so the result is proven like any checkpoint before a byte is written. Knows no torch and no directory of
its own. Next: configs.py for what config.json says afterwards, stream.py for the bytes.
"""

import json
from collections.abc import Container, Iterable, Mapping
from math import prod
from typing import NamedTuple

from saccade.base.near import ask
from saccade.base.printable import escape
from saccade.checkpoint.coding import Coding, find_codes, find_coding
from saccade.checkpoint.encoding import PLAIN, weight_of
from saccade.checkpoint.foreign import NAMED
from saccade.checkpoint.header import BITS
from saccade.checkpoint.index import Entry, File, Index
from saccade.convert.modules import COMPANIONS, by_number, explain_splits, find_near_modules, is_matched, module_of
from saccade.errors import ConvertError, PlanError, Problem
from saccade.models.registry import find_family
from saccade.plan import find_leftovers, find_shapes
from saccade.plan.fold import fold
from saccade.plan.names import find_root, name_in_family
from saccade.plan.types import Plan

CODES_DTYPE, SCALE_LEAF, BLOCK_SIDE = "F8_E4M3", "weight_scale_inv", 128  # of the FP8 that is written; scales are F32


class Mode(NamedTuple):
    """What was asked for."""

    name: str  # "upcast", "bf16" or "fp8"
    patterns: tuple[str, ...] = ()  # of "upcast": which modules

    @property
    def option(self) -> str:
        """As it stands on the command line."""
        return " ".join(f"--upcast {p}" for p in self.patterns) if self.name == "upcast" else f"--{self.name}"


class OutputTensor(NamedTuple):
    """A tensor of the result and its place in its file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    op: str  # "copy", "dequantize", "round" (to BF16), "quantize" (to FP8), "scale" (written with its codes)
    source: Entry
    coding: Coding | None  # of "dequantize"
    start: int = 0  # bytes in the file, half-open
    stop: int = 0


class Output(NamedTuple):
    """A file of the result."""

    name: str
    header: bytes  # the length and the JSON; empty for a whole copy
    items: tuple[OutputTensor, ...]
    size: int
    whole: bool  # a copy of the source's file, byte for byte


def find_items(plan: Plan, mode: Mode, fp8_modules: frozenset[str]) -> list[OutputTensor]:
    """Every tensor of the result, unplaced, in the order of the source's files. ConvertError for what the mode cannot
    be asked of this checkpoint."""
    entries = plan.index.entries
    held = find_held(plan)
    shapes = find_shapes(plan.config, plan.index)
    chosen: dict[str, OutputTensor] = {}
    leftovers, root = find_leftovers(plan.config, plan.index), find_root(plan.config, entries)
    stays_plain = find_family(plan.config.model_type).stays_plain
    for entry in entries.values():
        matrix = weight_of(entry.name) or entry.name
        codes = find_codes(matrix, entries)
        if codes is not None and codes.name != entry.name:
            continue  # a companion: it goes where its codes go
        if entry.name in leftovers:
            continue  # of a cache: it stays as it is, whatever its dtype
        if mode.name == "upcast" and not is_matched(module_of(entry.name), mode.patterns):
            continue  # not judged: it stays as it is
        coding = find_coding(matrix, entries, shapes.get(matrix))
        if isinstance(coding, Problem):  # of a tensor that no parameter uses, or the plan would have refused it
            raise PlanError(f"{coding.name} {coding.text}", (coding,))
        if mode.name == "fp8":
            if coding is not None:
                text = f"is stored as {coding.encoding.name}; --fp8 encodes plain numbers: convert it with --bf16 first"
                raise ConvertError(f"{entry.name} {text}")
            module, _, leaf = entry.name.rpartition(".")
            is_linear = leaf == "weight" and module.rpartition(".")[2] in fp8_modules
            if is_linear and len(entry.shape) == 2 and not stays_plain(plan.config, name_in_family(module, root)):
                chosen[entry.name] = OutputTensor(entry.name, CODES_DTYPE, entry.shape, "quantize", entry, None)
        elif coding is not None:
            chosen[entry.name] = OutputTensor(matrix, "BF16", coding.shape, "dequantize", entry, coding)
        elif mode.name == "bf16" and entry.dtype in ("F16", "F32") and held.get(entry.name) == {"BF16"}:
            chosen[entry.name] = OutputTensor(entry.name, "BF16", entry.shape, "round", entry, None)
    require_known(plan, mode)
    if not chosen:
        raise ConvertError(explain_nothing(plan, mode))
    # A companion that is left behind by mistake is found: the result is proven too, and there it is a problem.
    dropped = {
        f"{module_of(i.name)}.{leaf}" for i in chosen.values() if i.op == "dequantize" for leaf in COMPANIONS
    } - chosen.keys()
    items = []
    for entry in sorted(entries.values(), key=lambda e: (e.file, e.start)):
        if entry.name in chosen:
            item = chosen[entry.name]
            items.append(item)
            if item.op == "quantize":
                shape = tuple(-(-n // BLOCK_SIDE) for n in entry.shape)
                items.append(OutputTensor(f"{module_of(entry.name)}.{SCALE_LEAF}", "F32", shape, "scale", entry, None))
        elif entry.name not in dropped:
            items.append(OutputTensor(entry.name, entry.dtype, entry.shape, "copy", entry, None))
    return items


def find_held(plan: Plan) -> dict[str, set[str]]:
    """In which dtypes the loaded model holds the numbers of each tensor."""
    held: dict[str, set[str]] = {}
    for step in plan.steps:
        held.setdefault(step.source, set()).add(plan.stored[step.target].dtype)
    return held


def explain_nothing(plan: Plan, mode: Mode) -> str:
    root = escape(plan.index.root)
    if mode.name == "bf16":
        return f"{root}: is BF16 throughout, there is nothing to convert"
    if mode.name == "fp8":
        return f"{root}: has no matrix that the published layout stores as FP8"
    modules = {module_of(name) for name in plan.index.entries}
    found = fold(sorted((m for m in modules if is_matched(m, mode.patterns)), key=by_number))
    more = f" and {len(found) - NAMED:,} more" if len(found) > NAMED else ""
    return f"{root}: {', '.join(found[:NAMED])}{more}: plain numbers already, nothing to convert"


def require_known(plan: Plan, mode: Mode) -> None:
    """ConvertError for the first pattern that names no module, with what it may have meant."""
    modules = {module_of(name) for name in plan.index.entries} - {""}
    for pattern in mode.patterns:
        if not any(is_matched(module, [pattern]) for module in modules):
            near = find_near_modules(pattern, modules)
            raise ConvertError(f"{plan.index.title}: no module is called {pattern}{ask(near)}")


def is_plain(items: Iterable[OutputTensor], leftovers: Container[str] = ()) -> bool:
    """Whether nothing quantised is left; what belongs to no matrix (an offset of caches, I8) does not count."""
    return all(item.dtype in PLAIN or item.name in leftovers for item in items)


def find_splits(items: Iterable[OutputTensor], mode: Mode) -> list[str]:
    """What this upcast makes plain in part although engines build it as one: a line each."""
    items = list(items)
    decoded = {module_of(item.name) for item in items if item.op == "dequantize"}
    coded = {module_of(item.name) for item in items if item.dtype not in PLAIN} - decoded
    return explain_splits(decoded, coded, mode.patterns)


def place_items(
    index: Index, items: Iterable[OutputTensor], metadata: Mapping[str, dict[str, str] | None]
) -> list[Output]:
    """The files of the result. A file whose tensors are all dropped (one that held only scales) is not written."""
    by_file: dict[str, list[OutputTensor]] = {file.name: [] for file in index.files}
    for item in items:
        by_file[item.source.file].append(item)
    counts = {file.name: file.tensors for file in index.files}
    sizes = {file.name: file.size for file in index.files}
    outputs = []
    for name, mine in by_file.items():
        if len(mine) == counts[name] and all(item.op == "copy" for item in mine):
            placed = tuple(i._replace(start=i.source.start, stop=i.source.stop) for i in mine)
            outputs.append(Output(name, b"", placed, sizes[name], whole=True))
        elif mine:
            outputs.append(lay_out(name, mine, metadata[name]))
    return outputs


def lay_out(name: str, items: list[OutputTensor], metadata: dict[str, str] | None) -> Output:
    """A file's header and spans: wide dtypes first, so that every tensor lies on a multiple of its element size."""
    header: dict[str, object] = {} if metadata is None else {"__metadata__": metadata}
    ordered = sorted(items, key=lambda item: -BITS[item.dtype])
    spans, at = [], 0
    for item in ordered:
        size = prod(item.shape) * BITS[item.dtype] // 8
        header[item.name] = {"dtype": item.dtype, "shape": item.shape, "data_offsets": (at, at + size)}
        spans.append((at, at + size))
        at += size
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    base = 8 + len(raw)
    placed = tuple(i._replace(start=base + a, stop=base + b) for i, (a, b) in zip(ordered, spans, strict=True))
    return Output(name, len(raw).to_bytes(8, "little") + raw, placed, base + at, whole=False)


def index_of(outputs: Iterable[Output], root: str) -> Index:
    """The Index that `read_index` will find in the result."""
    outputs = tuple(outputs)
    entries = {i.name: Entry(i.name, i.dtype, i.shape, o.name, i.start, i.stop) for o in outputs for i in o.items}
    files = tuple(File(o.name, o.size, len(o.header), len(o.items)) for o in outputs)
    return Index(root, files, entries, (), (), 0)
