"""The directory that a conversion writes to: who may write there, what of an earlier run may stay, what comes last.

A lock is held from before the first byte until after the last, and a small journal, `.saccade-convert.json`, stands
there for as long and says which source and which options. Files get their names when they are whole and on the disk;
config.json, without which no engine and no `saccade check` takes a directory for a model, is the very last. Knows no
torch and no tensor. Next: stream.py, which fills the files.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from saccade.checkpoint.header import show_name
from saccade.checkpoint.index import INDEX_FILE, SUFFIX, Index
from saccade.checkpoint.open import JOURNAL
from saccade.convert.changes import Mode, Output
from saccade.errors import ConvertError

CONFIG = "config.json"
LOCK = ".saccade-convert.lock"  # held by the one writer, gone when it ends
PART = ".{}.part"  # the name that a file has while it is written
SAMPLES, SAMPLE_BYTES = 16, 4096  # of each source file, evenly spread
SMALL_BYTES = 64 << 10  # of a tensor that is hashed whole: scales, norms, biases
BUSY = "another conversion is writing to it; wait for that to end"
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
                for k in range(SAMPLES):
                    digest.update(os.pread(f.fileno(), SAMPLE_BYTES, size * k // SAMPLES))
                for start, stop in sorted(small[file.name]):
                    digest.update(os.pread(f.fileno(), stop - start, start))
        except OSError as e:
            raise ConvertError(f"{file.name}: cannot be read: {e.strerror} (in {index.root})") from None
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
        here, there = out.resolve(), source.resolve()
        if here == there or there in here.parents:
            raise ConvertError(f"{out}: is {'' if here == there else 'inside '}the model itself; choose another place")
        if here in there.parents:
            raise ConvertError(f"{out}: holds the model itself; choose another place")
        if not out.exists():
            return False
        if not out.is_dir():
            raise ConvertError(f"{out}: is a file; expected a new or an empty directory")
        names = sorted(set(os.listdir(out)) - {PART.format(JOURNAL), LOCK})
        if not names:
            return False
        if JOURNAL not in names:
            if CONFIG in names:
                raise ConvertError(f"{out}: holds a model already; choose a new or an empty directory")
            raise ConvertError(f"{out}: holds {show_name(names[0])}; expected a new or an empty directory")
        begun = read_journal(out)
    except FileNotFoundError:  # a journal that was there a moment ago
        raise ConvertError(f"{out}: {BUSY}") from None
    except OSError as e:
        raise ConvertError(f"{out}: cannot be opened: {e.strerror}") from None
    if begun.option != journal.option:
        text = f"holds the beginning of {begun.option} of {begun.source}, this is {journal.option}"
        raise ConvertError(f"{out}: {text}; finish that, remove it, or choose another directory")
    if begun.identity != journal.identity:
        text = f"holds the beginning of a conversion of {begun.source} as it was then, not of this {journal.source}"
        raise ConvertError(f"{out}: {text}; remove it or choose another directory")
    return True


def read_journal(out: Path) -> Journal:
    try:
        values = json.loads((out / JOURNAL).read_bytes())
        return Journal(*(show_name(values[key]) for key in Journal._fields))
    except (ValueError, KeyError, TypeError):
        text = f"its {JOURNAL} is no journal of a conversion; remove the directory or choose another"
        raise ConvertError(f"{out}: {text}") from None


def find_finished(out: Path, outputs: Iterable[Output]) -> set[str]:
    """The files of an earlier run that stay. Names are given to whole files only; size and header are looked at again,
    in case somebody else was there."""
    finished = set()
    for output in outputs:
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
            raise ConvertError(f"{out}: {text}; {AGAIN}")


def require_space(out: Path, nbytes: int) -> None:
    """ConvertError if the disk of `out` has no room for so many more bytes."""
    place = out.resolve()
    while not place.exists():
        place = place.parent
    try:
        free = shutil.disk_usage(place).free
    except OSError as e:
        raise ConvertError(f"{out}: cannot be opened: {e.strerror}") from None
    if free < nbytes:
        raise ConvertError(
            f"{out}: the result needs {nbytes:,} bytes more, its disk has {free:,} free; nothing written"
        )


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Make the directory, if it is not there, and hold it for one writer while the body runs."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        descriptor = take_lock(out / LOCK)
    except BlockingIOError:
        raise ConvertError(f"{out}: {BUSY}") from None
    except OSError as e:
        raise ConvertError(f"{out}: cannot be written to: {e.strerror}") from None
    try:
        yield
    finally:
        with suppress(OSError):
            os.unlink(out / LOCK)  # while it is held: whoever waits for it sees that it is gone
        os.close(descriptor)


def take_lock(path: Path) -> int:
    """The descriptor of a file that is locked as long as that is open. BlockingIOError if it is locked already. It is
    open for writing because on NFS nothing else can be locked."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its holder removed it meanwhile: the next one is another file


@contextmanager
def opened(out: Path, journal: Journal) -> Iterator[None]:
    """Keep a journal in a directory that is locked while the body runs; it goes when the body ends well."""
    try:
        if not (out / JOURNAL).exists():
            write_file(out, JOURNAL, json.dumps(journal._asdict(), indent=2).encode() + b"\n")
    except OSError as e:
        raise ConvertError(f"{out}: cannot be written to: {e.strerror}") from None
    remove_parts(out)
    try:
        yield
    except BaseException:
        with suppress(OSError):
            remove_parts(out)
        raise
    os.unlink(out / JOURNAL)


def remove_parts(out: Path) -> None:
    """Files that never became whole."""
    for part in out.rglob(PART.format("*")):
        part.unlink()


def part_of(path: Path) -> Path:
    """The name that a file has while it is written."""
    return path.with_name(PART.format(path.name))


def write_file(out: Path, name: str, content: bytes) -> None:
    """A small file, whole or not at all."""
    part = part_of(out / name)
    with open(part, "wb") as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())
    publish(out, name)


def publish(out: Path, name: str) -> None:
    """Give a file that is on the disk its name, and bring the name to the disk too."""
    path = out / name
    os.replace(part_of(path), path)
    descriptor = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def find_others(root: Path, without: frozenset[str]) -> list[str]:
    """What else lies beside the tensors and is kept: tokenizer, cards, code, in folders too. Not tensors that the
    checkpoint does not use, no hidden folder (version control, download caches), and nothing of a conversion that was
    cut short here: its journal and lock, files that never became whole."""
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(d for d in folders if not d.startswith("."))
        for name in sorted(names):
            path = Path(folder, name)
            relative = str(path.relative_to(root))
            unfinished = name in (JOURNAL, LOCK) or fnmatchcase(name, PART.format("*"))
            if unfinished or name.endswith((SUFFIX, SUFFIX + ".index.json")):
                continue
            if relative not in without and relative != CONFIG and path.is_file():
                found.append(relative)
    return found


def copy_other(root: Path, out: Path, name: str) -> None:
    """One file, byte for byte."""
    target = out / name
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(root / name, "rb") as source, open(part_of(target), "wb") as copy:
        shutil.copyfileobj(source, copy, 1 << 20)
        copy.flush()
        os.fsync(copy.fileno())
    publish(target.parent, target.name)


def write_listing(out: Path, outputs: Iterable[Output], metadata: dict[str, Any]) -> None:
    """model.safetensors.index.json of the result."""
    outputs = list(outputs)
    weight_map = {item.name: output.name for output in outputs for item in output.items}
    total = sum(item.stop - item.start for output in outputs for item in output.items)
    listing = {"metadata": metadata | {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_file(out, INDEX_FILE, json.dumps(listing, indent=2, ensure_ascii=False).encode() + b"\n")
