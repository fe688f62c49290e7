"""One checkpoint becomes another: prove the source, plan the result, prove that too, then stream, then publish.

Everything that can be refused is refused before anything is written. An interrupted run leaves a directory without
config.json, which nothing takes for a model, and the same call goes on where it ended. What is known beforehand is
prepare.py's, where and when files appear target.py's, the bytes are stream.py's: the only one that needs torch, which
is imported when there is nothing left to refuse without it.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from saccade.base.disk import HOPELESS
from saccade.base.limits import THREAD_LIMIT, count_cpus
from saccade.base.printable import escape
from saccade.base.values import is_count, show
from saccade.checkpoint.header import show_name
from saccade.checkpoint.index import Index
from saccade.convert import target
from saccade.convert.changes import Mode, Output, index_of
from saccade.convert.links import Ahead, Links, check_link, choose_links, guess_links, look_ahead
from saccade.convert.modules import by_number
from saccade.convert.place import Place, held
from saccade.convert.prepare import Conversion, count_json_bytes, find_todo, identify, prepare_conversion
from saccade.convert.report import Report, count_changes
from saccade.errors import ContentsError, ConvertError, LoadError, RequestError, explain_missing
from saccade.plan.problems import show_problems

if TYPE_CHECKING:
    from saccade.convert.stream import CopyTally

    pass

MOST_THREADS = 8
UNABLE = "its file system cannot do what this needs; convert to a local disk and copy the result"

Shown = Callable[[int, int], None]
Told = Callable[[Ahead], None]


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
    if threads is not None and not (is_count(threads, 1) and threads <= THREAD_LIMIT):
        wanted = f"an integer of at least 1 and at most {THREAD_LIMIT}"
        raise RequestError(f"threads: expected {wanted}, found {show(threads)}")
    check_link(link)
    threads = threads or min(MOST_THREADS, count_cpus())
    job = prepare_conversion(model, out, mode, link, revision, tell)
    todo = find_todo(job)
    guessed = guess_links(job.root, job.out, todo, link)
    target.require_space(job.out, count_todo(job, todo, guessed))
    try:
        from saccade.convert import stream
    except ModuleNotFoundError as error:
        if ahead is not None:
            ahead(look_ahead(job.outputs, todo, job.root, job.out, guessed))
        raise explain_missing(error, "convert: to write this") from None
    require_sound_scales(job, threads)
    tally = stream.CopyTally()
    with held(job.out) as place:
        todo = find_todo(job)  # again: another conversion may have been here since
        links = choose_linked(job, place, todo)
        plan = look_ahead(job.outputs, todo, job.root, job.out, links)
        if ahead is not None:
            ahead(plan)
        with target.keep_journal(place, job.journal):
            write_files(job, todo, links, place, threads, tally, progress)
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
        memory_bound=stream.memory_bound(job.plan.index, todo, threads, count_json_bytes(job)),
    )


def choose_linked(job: Conversion, place: Place, todo: list[Output]) -> Links:
    """Which files will be links. ConvertError for what cannot be written there, nothing of which has been."""
    try:
        target.require_names(place, job.all_names)
        links = choose_links(job.root, place, todo, job.link)
    except OSError as e:
        raise ConvertError.at(job.out, f"cannot be written to: {e.strerror}") from None
    target.require_space(job.out, count_todo(job, todo, links))
    return links


def write_files(
    job: Conversion,
    todo: list[Output],
    links: Links,
    place: Place,
    threads: int,
    tally: "CopyTally",
    progress: Shown | None,
) -> None:
    """Fill the directory, in the order in which it becomes a model."""
    from saccade.convert.stream import write_outputs

    todo = [output for output in todo if output.name not in links.hows]
    total = count_source_bytes(job.plan.index, todo)

    def note(_: int) -> None:
        if progress is not None:
            progress(tally.read, total)

    try:
        for name, how in links.hows.items():
            if reason := place.link(how, os.path.realpath(job.root / name), name):
                raise ConvertError.at(job.out, f"{name} cannot be a link any more: {reason}; {target.AGAIN}")
        write_outputs(job.plan.index, todo, place, threads, tally, note)
        for other in job.others.files:
            place.copy(job.root / other.name, other.name)
        if identify(job) != job.journal.identity:
            raise ConvertError.at(job.root, f"changed while it was read; remove {escape(str(job.out))} and start again")
        target.refuse_strangers(job.out, job.names)
        publish(job, place)
    except LoadError as e:
        raise ConvertError(f"{e}; {target.AGAIN}") from None
    except OSError as e:
        where = f" {show_name(os.path.basename(e.filename))}" if isinstance(e.filename, str) else ""
        place.is_hopeless = e.errno in HOPELESS
        cure = UNABLE if place.is_hopeless else target.AGAIN
        raise ConvertError.at(job.out, f"cannot write{where}: {e.strerror}; {cure}") from None


def publish(job: Conversion, place: Place) -> None:
    """The files that make a directory a model, config.json last."""
    if job.listing is not None:
        target.write_listing(place, job.outputs, job.listing)
    for name, text in job.texts.items():
        if name != target.CONFIG_FILE:
            place.write(name, text)
    place.write(target.CONFIG_FILE, job.texts[target.CONFIG_FILE])


def require_sound_scales(job: Conversion, threads: int) -> None:
    """Refuse scales, and offsets, that `check --contents` calls a problem: once codes are decoded, they are gone, and
    no check of the result could tell. Those of codes that stay codes stay too."""
    from saccade.inspect.contents import judge_scales

    codings = [item.coding for output in job.outputs for item in output.items if item.coding is not None]
    names = dict.fromkeys(name for c in codings for name in (*c.partners, c.offset) if name is not None)
    try:
        problems = judge_scales(job.plan.config, job.plan.index, names, threads)
    except LoadError as e:
        raise ConvertError(f"{e}; nothing was written") from None
    if problems:
        text = "cannot be converted, because nobody could tell afterwards what is wrong with it; nothing was written"
        raise ContentsError.at(job.root, f"{text}\n{show_problems(problems)}")


def count_todo(job: Conversion, todo: list[Output], links: Links) -> int:
    """What is still to be written."""
    others = sum(other.size for other in job.others.files)
    tensors = sum(output.size for output in todo if output.name not in links.hows)
    return tensors + others + sum(len(text) for text in job.texts.values())


def count_source_bytes(index: Index, todo: list[Output]) -> int:
    """What is still to be read; scales that lie in other files, a few hundredths, are left out."""
    sizes = {file.name: file.size - file.header_bytes for file in index.files}
    return sum(output.size if output.whole else sizes[output.name] for output in todo)
