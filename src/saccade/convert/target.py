"""What a directory to convert into may hold: nothing, or the beginning of this very conversion, by its journal.

A small journal, `.saccade-convert.json`, stands there from before the first byte until after the last and says which
source and which options; the lock is place.py's. config.json, without which no engine and no `saccade check` takes a
directory for a model, is the very last to appear. Knows no torch and no tensor. Next: stream.py, which fills the files.
"""

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from saccade.base.disk import find_clash, find_free, find_too_long, is_same
from saccade.base.printable import escape
from saccade.checkpoint.header import show_name
from saccade.checkpoint.index import INDEX_FILE, SUFFIX, Index
from saccade.checkpoint.open import JOURNAL
from saccade.convert.changes import Mode, Output
from saccade.convert.links import is_as_asked
from saccade.convert.place import BUSY_TEXT, LOCK, PART_NAME, Place, remove_parts
from saccade.errors import ConvertError

CONFIG_FILE = "config.json"
FILE_SAMPLES, SAMPLE_BYTES = 16, 4096  # of each source file, evenly spread
SMALL_BYTES = 64 << 10  # of a tensor that is hashed whole: scales, norms, biases
AGAIN = "what is finished stays: run the same command again to go on"


class Journal(NamedTuple):
    """Which conversion a directory holds the beginning of."""

    source: str  # a path, for people
    option: str
    identity: str


def hash_inputs(index: Index, mode: Mode, outputs: Iterable[Output], texts: Iterable[bytes]) -> str:
    """A digest of the source, the options and the result's form. Of each source file: name, size, header, every tensor
    of at most 64 KiB, because a scale may be mended in place between two runs, and 16 samples of 4 KiB, because two
    fine-tunes of a model have the same names, sizes and headers; no time stamps, which say nothing about content.
    `texts` are the JSON files of the result."""
    digest = hashlib.sha256()

    def add(*things: object) -> None:
        digest.update(json.dumps([str(t) for t in things]).encode())

    small = defaultdict(list)
    for entry in index.entries.values():
        if entry.stop - entry.start <= SMALL_BYTES:
            small[entry.file].append((entry.start, entry.stop))
    add(1, mode)
    for file in index.files:
        try:
            with open(os.path.join(index.root, file.name), "rb", buffering=0) as f:
                size = os.fstat(f.fileno()).st_size
                add(file.name, size)
                digest.update(f.read(file.header_bytes))
                for k in range(FILE_SAMPLES):
                    digest.update(os.pread(f.fileno(), SAMPLE_BYTES, size * k // FILE_SAMPLES))
                for start, stop in sorted(small[file.name]):
                    digest.update(os.pread(f.fileno(), stop - start, start))
        except OSError as e:
            raise ConvertError(f"{file.name}: cannot be read: {e.strerror} (in {index.title})") from None
    for output in outputs:
        add(output.name, output.size)
        digest.update(output.header)
    for text in texts:
        add(len(text))
        digest.update(text)
    return digest.hexdigest()


def find_begun(out: Path, source: Path, journal: Journal) -> bool:
    """Whether `out` holds the beginning of this very conversion. ConvertError if it may not be written to at all:
    nothing has been touched then. `source` is the directory that is read."""
    try:
        refuse_nested(out, source)
        if not out.exists():
            return False
        if not out.is_dir():
            raise ConvertError.at(out, "is a file; expected a new or an empty directory")
        names = sorted(set(os.listdir(out)) - {PART_NAME.format(JOURNAL), LOCK, PART_NAME.format(LOCK)})
        if not names:
            return False
        if JOURNAL not in names:
            if CONFIG_FILE in names:
                raise ConvertError.at(out, "holds a model already; choose a new or an empty directory")
            raise ConvertError.at(out, f"holds {show_name(names[0])}; expected a new or an empty directory")
        begun = read_journal(out)
    except FileNotFoundError:  # a journal that was there a moment ago
        raise ConvertError.at(out, BUSY_TEXT) from None
    except OSError as e:
        raise ConvertError.at(out, f"cannot be opened: {e.strerror}") from None
    source_then = show_name(begun.source)
    if begun.option != journal.option:
        text = (
            f"holds the beginning of {show_name(begun.option)} of {show_name(begun.source)}, this is {journal.option}"
        )
        raise ConvertError.at(out, f"{text}; finish that, remove it, or choose another directory")
    if begun.identity != journal.identity:
        text = (
            f"holds the beginning of a conversion of {source_then} as it was then, not of this {escape(journal.source)}"
        )
        raise ConvertError.at(out, f"{text}; remove it or choose another directory")
    return True


def refuse_nested(out: Path, source: Path) -> None:
    """ConvertError if one of two directories is, or lies in, the other, under whatever name."""
    try:
        here, there = out.resolve(), source.resolve()
        os.lstat(here)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as e:  # no name at all: too long, or with a zero byte
        raise ConvertError.at(out, f"cannot be opened: {getattr(e, 'strerror', None) or e}") from None
    if is_within(here, there):
        is_it = here == there or (here.exists() and is_same(here.stat(), there.stat()))
        raise ConvertError.at(out, f"is {'' if is_it else 'inside '}the model itself; choose another place")
    if here.exists() and is_within(there, here):
        raise ConvertError.at(out, "holds the model itself; choose another place")


def is_within(path: Path, folder: Path) -> bool:
    """Whether a path is a directory or lies in it, also by another mount or in other letters' case."""
    there = folder.stat()
    return any(p == folder or (p.exists() and is_same(p.stat(), there)) for p in (path, *path.parents))


def read_journal(out: Path) -> Journal:
    try:
        values = json.loads((out / JOURNAL).read_bytes())
        journal = Journal(*(values[key] for key in Journal._fields))
        if not all(isinstance(value, str) for value in journal):
            raise ValueError("expected text")
        return journal
    except (ValueError, KeyError, TypeError, RecursionError):
        text = f"its {JOURNAL} is no journal of a conversion; remove the directory or choose another"
        raise ConvertError.at(out, text) from None


def find_finished(out: Path, outputs: Iterable[Output], source: Path, link: str | None) -> set[str]:
    """The files of an earlier run that stay. Names are given to whole files only; size and header are looked at again,
    in case somebody else was there, and whether a file in which nothing changes is there as `link` asks."""
    finished = set()
    for output in outputs:
        if output.whole and not is_as_asked(out / output.name, source / output.name, link):
            continue
        with suppress(OSError), open(out / output.name, "rb") as f:
            if os.fstat(f.fileno()).st_size == output.size and f.read(len(output.header)) == output.header:
                finished.add(output.name)
    return finished


def refuse_strangers(out: Path, names: Iterable[str]) -> None:
    """ConvertError for a file with tensors, or a list of such files, that is none of the result's `names`: whoever
    loads the result would take it for a part. Anything else that somebody put there does no harm."""
    known = set(names)
    for name in sorted(os.listdir(out)):
        if name.endswith((SUFFIX, SUFFIX + ".index.json")) and not name.startswith(".") and name not in known:
            text = f"holds {show_name(name)}, which is none of this conversion's files; move it away"
            raise ConvertError.at(out, f"{text}; {AGAIN}")


def require_space(out: Path, nbytes: int) -> None:
    """ConvertError if the disk of `out` has no room for so many more bytes."""
    try:
        free = find_free(out)
    except OSError as e:
        raise ConvertError.at(out, f"cannot be opened: {e.strerror}") from None
    if free is not None and free < nbytes:
        raise ConvertError.at(
            out, f"the result needs {nbytes:,} bytes more, its disk has {free:,} free; nothing written"
        )


@contextmanager
def keep_journal(place: Place, journal: Journal) -> Iterator[None]:
    """Keep a journal in a directory that is held while the body runs; it goes when the body ends well, and with all
    that was made if its file system turns out to be unable to hold a result."""
    is_new = not (place.out / JOURNAL).exists()
    try:
        if is_new:
            place.write(JOURNAL, to_json_bytes(journal._asdict()))
        remove_parts(place.out)
    except OSError as e:
        with suppress(OSError):
            remove_parts(place.out)
        if is_new:
            place.remove([JOURNAL])
        raise ConvertError.at(place.out, f"cannot be written to: {e.strerror}") from None
    begun = place.finished
    try:
        yield
    except BaseException:
        with suppress(OSError):
            remove_parts(place.out)
        if is_new and place.is_hopeless and place.finished == begun:
            place.remove([*place.linked, JOURNAL])
        raise
    place.remove([JOURNAL])


def require_names(place: Place, names: Iterable[str]) -> None:
    """ConvertError for files that cannot be called so there."""
    names = sorted(names)
    if found := find_too_long(place.out, names):
        text = f"its file system takes names of {found[1]} bytes at most; choose another place, or rename it"
        raise ConvertError.at(place.out, f"{show_name(found[0])}: {text}; nothing was written")
    if place.is_case_blind() and (clash := find_clash(names)):
        a, b = map(show_name, clash)
        text = f"{a} and {b} are one name on its file system; choose another place, or rename one"
        raise ConvertError.at(place.out, f"{text}; nothing was written")


def write_listing(place: Place, outputs: Iterable[Output], metadata: dict[str, Any]) -> None:
    """model.safetensors.index.json of the result."""
    outputs = list(outputs)
    weight_map = {item.name: output.name for output in outputs for item in output.items}
    total = sum(item.stop - item.start for output in outputs for item in output.items)
    listing = {"metadata": metadata | {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    place.write(INDEX_FILE, to_json_bytes(listing))


def to_json_bytes(values: Any) -> bytes:
    """JSON for people, in UTF-8; half of a surrogate pair, which UTF-8 cannot hold, stands as its escape."""
    text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    try:
        return text.encode()
    except UnicodeEncodeError:
        return json.dumps(values, indent=2).encode() + b"\n"
