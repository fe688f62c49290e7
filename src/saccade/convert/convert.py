"""One checkpoint becomes another: prove the source, plan the result, prove that too, then stream, then publish.

Everything that can be refused is refused before anything is written. An interrupted run leaves a directory without
config.json, which nothing takes for a model, and the same call goes on where it ended. What changes is decided in
changes.py and configs.py, where and when files appear in target.py, the bytes are stream.py's.
"""

import json
import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from saccade.base.disk import HOPELESS
from saccade.base.limits import count_cpus
from saccade.base.values import is_count, show, show_count
from saccade.checkpoint.header import parse_json, show_name
from saccade.checkpoint.hub.fetch import Source, fetch_checkpoint
from saccade.checkpoint.index import INDEX_FILE, Index
from saccade.checkpoint.open import open_model
from saccade.checkpoint.write import FP8_MODULES
from saccade.config.file import Config
from saccade.convert import target
from saccade.convert.changes import Mode, Output, find_items, find_splits, index_of, is_plain, place_items
from saccade.convert.configs import QUANTISERS, Plainness, convert_config, convert_quantiser, find_plain
from saccade.convert.links import Ahead, Links, check_link, choose_links, guess_links, look_ahead
from saccade.convert.modules import by_number
from saccade.convert.others import Others, find_others
from saccade.convert.place import Place, held
from saccade.convert.stream import Tally, memory_bound, write_outputs
from saccade.errors import ContentsError, ConvertError, LoadError, PlanError, RequestError
from saccade.inspect.contents import judge_scales
from saccade.models.registry import make_config
from saccade.plan import find_leftovers, make_plan, prove, require
from saccade.plan.show import show_problems
from saccade.plan.types import Plan

MOST_THREADS = 8
UNABLE = "its file system cannot do what this needs; convert to a local disk and copy the result"

Shown = Callable[[int, int], None]
Told = Callable[[Ahead], None]


@dataclass(frozen=True)
class Report:
    """What a conversion did."""

    out: str
    source: str
    mode: Mode
    files: int  # with tensors
    kept_files: int  # of them from an earlier run
    others: tuple[str, ...]  # files copied as they are
    dropped: tuple[str, ...]  # files that describe a quantisation which is no more
    left_out: tuple[str, ...]  # tensors beside the model that are not part of it; hidden folders
    whole: dict[str, int]  # files with tensors in which nothing changes, by how they are there: hard, sym, copy
    whole_bytes: int
    tensors: tuple[int, int]  # before, after
    size: int  # bytes of the result's tensor files
    changes: dict[str, int]  # tensors by what became of them
    roundings: dict[str, float]  # tensors that were rounded in this run, with the largest relative error
    warnings: tuple[str, ...]  # what other engines may not take as it is, a line each
    notes: tuple[str, ...]  # what the file system lacks, a line each
    not_finite: tuple[str, ...]  # of those written in this run, tensors that hold NaN or infinity
    seconds: float
    threads: int
    memory_bound: int  # bytes that may be held at once, beyond what the process had before


@dataclass(frozen=True)
class Job:
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


def convert(
    model: str | Path | None,
    out: str | Path,
    mode: Mode,
    threads: int | None = None,
    progress: Shown | None = None,
    link: str | None = None,
    ahead: Told | None = None,
    revision: str | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> Report:
    """Convert `model` (a path, a Hugging Face id, None for the bundled checkpoint) into the directory `out`.

    PlanError if the source or the result would not load; ContentsError if its numbers are unsound; ConvertError for
    everything else that can be refused or go wrong, with nothing left behind that looks like a model. `progress` is
    told source bytes done and in all. `link`: how files in which nothing changes get there, "hard" (the default where
    the file system can), "sym" or "copy"; `ahead` is told beforehand what is about to be done. `revision` is
    an id's; `tell` hears what is fetched of it, and of long waits.
    """
    start = time.perf_counter()
    if threads is not None and not is_count(threads, 1):
        raise RequestError(f"threads: expected an integer of at least 1, found {show(threads)}")
    check_link(link)
    threads = threads or min(MOST_THREADS, count_cpus())
    job = prepare(model, out, mode, link, revision, tell)
    todo = find_todo(job)
    target.require_space(job.out, count_bytes(job, todo, guess_links(job.root, job.out, todo, link)))
    require_sound_scales(job, threads)
    tally = Tally()
    with held(job.out) as place:
        todo = find_todo(job)  # again: another conversion may have been here since
        links = choose(job, place, todo)
        plan = look_ahead(job.outputs, todo, job.root, job.out, links)
        if ahead is not None:
            ahead(plan)
        with target.opened(place, job.journal):
            write(job, todo, links, place, threads, tally, progress)
    after = index_of(job.outputs, str(job.out))
    return Report(
        out=str(job.out),
        source=str(job.root),
        mode=mode,
        files=len(job.outputs),
        kept_files=len(job.outputs) - len(todo),
        others=tuple(other.name for other in job.others.files),
        dropped=job.dropped,
        left_out=job.others.left_out,
        whole=dict(plan.whole),
        whole_bytes=plan.whole_bytes,
        tensors=(len(job.plan.index.entries), len(after.entries)),
        size=sum(output.size for output in job.outputs),
        changes=count_changes(job.outputs),
        roundings={name: tally.roundings[name] for name in sorted(tally.roundings, key=by_number)},
        warnings=job.warnings,
        notes=tuple(place.notes),
        not_finite=tuple(sorted(tally.not_finite, key=by_number)),
        seconds=time.perf_counter() - start,
        threads=threads,
        memory_bound=memory_bound(job.plan.index, todo, threads, count_json_bytes(job)),
    )


def prepare(
    model: str | Path | None,
    out: str | Path,
    mode: Mode,
    link: str | None = None,
    revision: str | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> Job:
    """Everything that can be known beforehand. Reads headers and JSON files, writes nothing."""
    path = fetch_checkpoint(model, revision, tell, before=partial(prove_source, tell), everything=True)
    config, index = open_model(path)
    plan = make_plan(config, index)
    index = plan.index  # less the files beside the model that are none of it
    require(plan)
    root = Path(index.root)
    items = find_items(plan, mode, frozenset(FP8_MODULES))
    metadata = {file.name: read_metadata(root, file.name, file.header_bytes) for file in index.files}
    outputs = tuple(place_items(index, items, metadata))
    plain = find_plain(items, config.num_hidden_layers)
    raw = read_bytes(root / target.CONFIG)
    values = json.loads(raw)
    all_plain = is_plain(items, find_leftovers(config, plan.index))
    changed, warnings = convert_config(values, mode, plain, all_plain)
    texts = {target.CONFIG: raw if changed == values else target.spell(changed)}
    present = {name for name in QUANTISERS if (root / name).is_file()}
    if mode.name == "upcast" and not all_plain:
        warnings += find_splits(items, mode)
        for name in sorted(present):
            texts[name], more = convert_quantiser_file(root, name, plain)
            warnings += more
    require_result(make_config(texts[target.CONFIG], target.CONFIG), index_of(outputs, str(out)))
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
    job = Job(plan, root, place, mode, outputs, texts, listing, others, dropped, told, journal, link)
    return Job(**{**vars(job), "journal": journal._replace(identity=identify(job))})


def find_todo(job: Job) -> list[Output]:
    """The files that are not there yet. ConvertError if the directory may not be written to."""
    begun = target.find_begun(job.out, job.root, job.journal)
    if begun:
        target.refuse_strangers(job.out, job.names)
    finished = target.find_finished(job.out, job.outputs, job.root, job.link) if begun else set()
    return [output for output in job.outputs if output.name not in finished]


def choose(job: Job, place: Place, todo: list[Output]) -> Links:
    """Which files will be links. ConvertError for what cannot be written there, nothing of which has been."""
    try:
        target.require_names(place, job.all_names)
        links = choose_links(job.root, place, todo, job.link)
    except OSError as e:
        raise ConvertError(f"{job.out}: cannot be written to: {e.strerror}") from None
    target.require_space(job.out, count_bytes(job, todo, links))
    return links


def write(
    job: Job, todo: list[Output], links: Links, place: Place, threads: int, tally: Tally, progress: Shown | None
) -> None:
    """Fill the directory, in the order in which it becomes a model."""
    todo = [output for output in todo if output.name not in links.hows]
    total = count_source_bytes(job.plan.index, todo)

    def note(_: int) -> None:
        if progress is not None:
            progress(tally.read, total)

    try:
        for name, how in links.hows.items():
            if reason := place.link(how, os.path.realpath(job.root / name), name):
                raise ConvertError(f"{job.out}: {name} cannot be a link any more: {reason}; {target.AGAIN}")
        write_outputs(job.plan.index, todo, place, threads, tally, note)
        for other in job.others.files:
            place.copy(job.root / other.name, other.name)
        if identify(job) != job.journal.identity:
            raise ConvertError(f"{job.root}: changed while it was read; remove {job.out} and start again")
        target.refuse_strangers(job.out, job.names)
        publish(job, place)
    except LoadError as e:
        raise ConvertError(f"{e}; {target.AGAIN}") from None
    except OSError as e:
        where = f" {show_name(os.path.basename(e.filename))}" if isinstance(e.filename, str) else ""
        place.is_hopeless = e.errno in HOPELESS
        cure = UNABLE if place.is_hopeless else target.AGAIN
        raise ConvertError(f"{job.out}: cannot write{where}: {e.strerror}; {cure}") from None


def identify(job: Job) -> str:
    return target.hash_inputs(job.plan.index, job.mode, job.outputs, [job.texts[name] for name in sorted(job.texts)])


def publish(job: Job, place: Place) -> None:
    """The files that make a directory a model, config.json last."""
    if job.listing is not None:
        target.write_listing(place, job.outputs, job.listing)
    for name, text in job.texts.items():
        if name != target.CONFIG:
            place.write(name, text)
    place.write(target.CONFIG, job.texts[target.CONFIG])


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


def require_sound_scales(job: Job, threads: int) -> None:
    """Refuse scales, and offsets, that `check --contents` calls a problem: once codes are decoded, they are gone, and
    no check of the result could tell. Those of codes that stay codes stay too."""
    codings = [item.coding for output in job.outputs for item in output.items if item.coding is not None]
    names = dict.fromkeys(name for c in codings for name in (*c.partners, c.offset) if name is not None)
    try:
        problems = judge_scales(job.plan.config, job.plan.index, names, threads)
    except LoadError as e:
        raise ConvertError(f"{e}; nothing was written") from None
    if problems:
        text = "cannot be converted, because nobody could tell afterwards what is wrong with it; nothing was written"
        raise ContentsError(f"{job.root}: {text}\n{show_problems(problems)}")


def read_metadata(root: Path, file: str, header_bytes: int) -> dict[str, str] | None:
    """The `__metadata__` of a safetensors file: transformers wants to read "pt" there."""
    raw = read_bytes(root / file, header_bytes)
    table, _ = parse_json(raw[8:])
    found = table.get("__metadata__")
    return found if isinstance(found, dict) else None


def read_listing_metadata(root: Path) -> dict[str, Any]:
    found = json.loads(read_bytes(root / INDEX_FILE)).get("metadata")
    return found if isinstance(found, dict) else {}


def convert_quantiser_file(root: Path, name: str, plain: Plainness) -> tuple[bytes, list[str]]:
    raw = read_bytes(root / name)
    try:
        values = json.loads(raw)
    except (ValueError, RecursionError):
        raise ConvertError(f"{root / name}: is not JSON; download it again") from None
    changed, warnings = convert_quantiser(name, values, plain)
    return (raw if changed == values else target.spell(changed)), warnings


def read_bytes(path: Path, count: int = -1) -> bytes:
    try:
        with open(path, "rb") as f:
            return f.read(count)
    except OSError as e:
        raise ConvertError(f"{path}: cannot be read: {e.strerror}") from None


def count_bytes(job: Job, todo: list[Output], links: Links) -> int:
    """What is still to be written."""
    others = sum(other.size for other in job.others.files)
    tensors = sum(output.size for output in todo if output.name not in links.hows)
    return tensors + others + sum(len(text) for text in job.texts.values())


def count_json_bytes(job: Job) -> int:
    """What the files of JSON hold that are read or written whole."""
    listing = job.root / INDEX_FILE
    texts = sum(len(text) for text in job.texts.values())
    return texts + (listing.stat().st_size if job.listing is not None and listing.is_file() else 0)


def count_source_bytes(index: Index, todo: list[Output]) -> int:
    """What is still to be read; scales that lie in other files, a few hundredths, are left out."""
    sizes = {file.name: file.size - file.header_bytes for file in index.files}
    return sum(output.size if output.whole else sizes[output.name] for output in todo)


def count_changes(outputs: tuple[Output, ...]) -> dict[str, int]:
    """Tensors of the result by what they were and are: "FP8 128x128 -> BF16", "copied"."""
    counts: Counter[str] = Counter()
    for output in outputs:
        for item in output.items:
            before = item.coding.encoding.name if item.coding else item.source.dtype
            if item.op == "quantize":
                counts[f"{before} -> FP8 128x128"] += 1
            elif item.op != "scale":
                counts["copied" if item.op == "copy" else f"{before} -> {item.dtype}"] += 1
    return dict(sorted(counts.items()))
