"""SHA-256 of files, compared with a list as `sha256sum` writes it. Standard library only.

Files that are scanned anyway are hashed in the same pass (contents.py); the others here.
"""

import hashlib
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from saccade.checkpoint.header import show_name
from saccade.checkpoint.index import Index
from saccade.errors import CheckpointError, Problem

DIGEST_LINE = re.compile(r"(\\?)([0-9a-fA-F]{64}) [ *](.+)")
TAGGED = re.compile(r"\\?[A-Z0-9-]+ \(.*\) = [0-9a-fA-F]+")  # what sha256sum --tag writes, and BSD's sha256
LIST_BYTES = 64 << 20
DIGEST_PIECE = 1 << 20

Digests = dict[str, str]  # file name -> 64 lower-case hexadecimal digits


def read_digests(path: str) -> Digests:
    """The list in a file. CheckpointError, with the line, if it is not what `sha256sum` writes."""
    where = show_name(path)
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise CheckpointError(f"{where}: is not a regular file; expected the output of sha256sum")
        with open(path, "rb") as f:
            raw = f.read(LIST_BYTES + 1)
        text = raw.decode()
    except UnicodeDecodeError:
        raise CheckpointError(f"{where}: is not text; expected the output of sha256sum") from None
    except (OSError, ValueError) as e:
        raise CheckpointError(f"{where}: cannot be read: {getattr(e, 'strerror', None) or e}") from None
    if len(raw) > LIST_BYTES:
        raise CheckpointError(f"{where}: has more than {LIST_BYTES:,} bytes; expected the output of sha256sum")
    digests: Digests = {}
    for number, line in enumerate(text.split("\n"), 1):
        line = line.removesuffix("\r")
        if not line:
            continue
        found = DIGEST_LINE.fullmatch(line)
        if found is None:
            wanted = "64 hexadecimal digits, two spaces and a file name"
            if TAGGED.fullmatch(line):
                wanted += ", as sha256sum writes them without --tag"
            raise CheckpointError(f"{where}, line {number}: expected {wanted}, found {ascii(line[:80])}")
        is_escaped, digest, name = found.groups()
        if is_escaped:  # sha256sum's way to write a name with a line break in it
            name = name.replace("\\n", "\n").replace("\\\\", "\\")
        name = os.path.normpath(name)
        if name.startswith(("/", "..")) or "\0" in name:
            raise CheckpointError(
                f"{where}, line {number}: {ascii(name[:80])} is not a file name relative to the model"
            )
        if digests.setdefault(name, digest.lower()) != digest.lower():
            raise CheckpointError(f"{where}, line {number}: {ascii(name[:80])} has another digest further up")
    if not digests:
        raise CheckpointError(f"{where}: is empty; expected the output of sha256sum")
    return digests


def size_of(path: str | os.PathLike[str]) -> int | None:
    """The bytes of a regular file; None if there is none of that name, or it cannot be told."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def hash_file(root: str, name: str, note: Callable[[int], None]) -> str | Problem:
    """The digest of a file of the list, or why there is none. `note` is told the bytes of each piece."""
    path = Path(root, name)
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # before open(), which would wait on a pipe
            raise FileNotFoundError
        digest = hashlib.sha256()
        with path.open("rb") as f:
            while piece := f.read(DIGEST_PIECE):
                digest.update(piece)
                note(len(piece))
    except (FileNotFoundError, NotADirectoryError):
        return Problem("missing-file", show_name(name), "is in the list of digests, but not here")
    except OSError as e:  # a name that is too long, links in a circle, no permission
        return Problem("unreadable", show_name(name), f"is in the list of digests, but cannot be read: {e.strerror}")
    return digest.hexdigest()


def compare_digests(index: Index, given: Mapping[str, str], found: Mapping[str, str | Problem]) -> list[Problem]:
    """Files that are missing, that differ, or that belong to the checkpoint and are not in the list."""
    problems = []
    for name, digest in given.items():
        actual = found[name]
        if isinstance(actual, Problem):
            problems.append(actual)
        elif actual != digest:
            text = f"has the SHA-256 {actual}, the list says {digest}: download it again"
            problems.append(Problem("sha256", show_name(name), text))
    for file in index.files:
        if file.name not in given:
            problems.append(Problem("sha256", file.name, "is part of the checkpoint, but not in the list of digests"))
    return problems


def find_extra(index: Index, is_directory: bool, given: Mapping[str, str], listing: str) -> Iterator[Problem]:
    """Other files of the directory that the list does not name: a note each."""
    if not is_directory:
        return
    known = {*given, *(file.name for file in index.files)}
    for item in sorted(os.scandir(index.root), key=lambda item: item.name):
        if item.name in known or item.name.startswith(".") or size_of(item) is None or os.path.samefile(item, listing):
            continue
        yield Problem("extra-file", show_name(item.name), "is not in the list of digests")
