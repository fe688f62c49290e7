"""All that can be known of a conversion before a byte is read or written: from headers and JSON files, without torch.

The source is proven, the result is planned and proven too. What changes is decided in changes.py and configs.py. Next:
convert.py, which carries a job out.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from saccade.base.values import show_count
from saccade.checkpoint.encoding import FP8_MODULES
from saccade.checkpoint.header import parse_json
from saccade.checkpoint.hub.fetch import Source, fetch_checkpoint
from saccade.checkpoint.index import INDEX_FILE, Index
from saccade.checkpoint.open import open_model
from saccade.config.file import Config
from saccade.convert import target
from saccade.convert.changes import Mode, Output, find_items, find_splits, index_of, is_plain, place_items
from saccade.convert.configs import QUANTISERS, Plainness, convert_config, convert_quantiser, find_plain
from saccade.convert.others import Others, find_others
from saccade.errors import ConvertError, PlanError
from saccade.models.registry import make_config
from saccade.plan import find_leftovers, make_plan, prove, require
from saccade.plan.names import find_layer_prefix, find_root
from saccade.plan.problems import show_problems
from saccade.plan.types import Plan


@dataclass(frozen=True)
class Conversion:
    """A conversion that is proven and not yet begun."""

    plan: Plan
    root: Path
    out: Path
    mode: Mode
    outputs: tuple[Output, ...]
    texts: dict[str, bytes]  # JSON files of the result, config.json among them
    listing: dict[str, Any] | None  # the metadata of index.json, if there will be one
    others: Others
    dropped: tuple[str, ...]
    warnings: tuple[str, ...]
    journal: target.Journal
    link: str | None

    @property
    def names(self) -> set[str]:
        """The result's files with tensors, and their list."""
        return {output.name for output in self.outputs} | (set() if self.listing is None else {INDEX_FILE})

    @property
    def all_names(self) -> set[str]:
        """Every file of the result."""
        return {*self.names, *self.texts, *(other.name for other in self.others.files)}


def prepare_conversion(
    model: str | Path | None,
    out: str | Path,
    mode: Mode,
    link: str | None = None,
    revision: str | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> Conversion:
    """Everything that can be known beforehand. Reads headers and JSON files, writes nothing."""
    path = fetch_checkpoint(model, revision, tell, before=partial(prove_source, tell), everything=True)
    config, index = open_model(path)
    plan = make_plan(config, index)
    index = plan.index  # less the files beside the model that are none of it
    require(plan)
    root = Path(index.root)
    items = find_items(plan, mode, FP8_MODULES)
    metadata = {file.name: read_metadata(root, file.name, file.header_bytes) for file in index.files}
    outputs = tuple(place_items(index, items, metadata))
    root_name = find_root(config, index.entries)
    plain = find_plain(items, find_layer_prefix(config, index.entries, config.num_hidden_layers), root_name)
    raw = read_opening(root / target.CONFIG_FILE)
    values = json.loads(raw)
    all_plain = is_plain(items, find_leftovers(config, plan.index))
    changed, warnings = convert_config(values, mode, plain, all_plain)
    texts = {target.CONFIG_FILE: raw if changed == values else target.to_json_bytes(changed)}
    present = {name for name in QUANTISERS if (root / name).is_file()}
    if mode.name == "upcast" and not all_plain:
        warnings += find_splits(items, mode)
        for name in sorted(present):
            texts[name], more = convert_quantiser_file(root, name, plain)
            warnings += more
    require_result(make_config(texts[target.CONFIG_FILE], target.CONFIG_FILE), index_of(outputs, str(out)))
    listing = read_listing_metadata(root) if path.is_dir() and (root / INDEX_FILE).is_file() else None
    if listing is None and len(outputs) > 1:
        listing = {}
    place = Path(out).expanduser()
    target.refuse_nested(place, root)
    known = {*present, *texts, INDEX_FILE, *(file.name for file in index.files)}
    others = find_others(root, frozenset(known), place)
    journal = target.Journal(str(root), mode.option, "")
    dropped = tuple(sorted(present - set(texts)))
    told = (*config.notes, *warnings)
    job = Conversion(plan, root, place, mode, outputs, texts, listing, others, dropped, told, journal, link)
    return Conversion(**{**vars(job), "journal": journal._replace(identity=identify(job))})


def find_todo(job: Conversion) -> list[Output]:
    """The files that are not there yet. ConvertError if the directory may not be written to."""
    begun = target.find_begun(job.out, job.root, job.journal)
    if begun:
        target.refuse_strangers(job.out, job.names)
    finished = target.find_finished(job.out, job.outputs, job.root, job.link) if begun else set()
    return [output for output in job.outputs if output.name not in finished]


def identify(job: Conversion) -> str:
    return target.hash_inputs(job.plan.index, job.mode, job.outputs, [job.texts[name] for name in sorted(job.texts)])


def prove_source(tell: Callable[[str], None], source: Source) -> Source:
    """What is to be fetched of a model by its id: nothing of one that would not load, no file of something else."""
    if not source.missing:
        return source  # planned when it is opened
    plan = make_plan(source.config, source.index)
    require(plan)
    kept = source.keep(plan.index)
    tell(f"fetching {show_count(len(kept.missing), 'file')} of {kept.name} into {kept.root}")
    return kept


def require_result(config: Config, index: Index) -> None:
    """Refuse a conversion whose result would not load."""
    problems = prove(make_plan(config, index))
    if problems:
        message = f"the result could not be loaded, nothing was written\n{show_problems(problems)}"
        raise PlanError(message, tuple(problems))


def read_metadata(root: Path, file: str, header_bytes: int) -> dict[str, str] | None:
    """The `__metadata__` of a safetensors file: transformers wants to read "pt" there."""
    raw = read_opening(root / file, header_bytes)
    table, _ = parse_json(raw[8:])
    found = table.get("__metadata__")
    return found if isinstance(found, dict) else None


def read_listing_metadata(root: Path) -> dict[str, Any]:
    found = json.loads(read_opening(root / INDEX_FILE)).get("metadata")
    return found if isinstance(found, dict) else {}


def convert_quantiser_file(root: Path, name: str, plain: Plainness) -> tuple[bytes, list[str]]:
    raw = read_opening(root / name)
    try:
        values = json.loads(raw)
    except (ValueError, RecursionError):
        raise ConvertError.at(root / name, "is not JSON; download it again") from None
    changed, warnings = convert_quantiser(name, values, plain)
    return (raw if changed == values else target.to_json_bytes(changed)), warnings


def read_opening(path: Path, count: int = -1) -> bytes:
    try:
        with open(path, "rb") as f:
            return f.read(count)
    except OSError as e:
        raise ConvertError.at(path, f"cannot be read: {e.strerror}") from None


def count_json_bytes(job: Conversion) -> int:
    """What the files of JSON hold that are read or written whole."""
    listing = job.root / INDEX_FILE
    texts = sum(len(text) for text in job.texts.values())
    return texts + (listing.stat().st_size if job.listing is not None and listing.is_file() else 0)
