"""What lies beside the tensors and is copied: tokenizer, cards, code, folders; and what cannot be copied, by name.

A link to a file is copied as that file, a linked folder as a folder. Nothing is left out without being told. Knows no
torch and no target's state. Next: place.py, which copies.
"""

import errno
import os
import stat
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from saccade.base.disk import is_same
from saccade.checkpoint.foreign import NAMED
from saccade.checkpoint.header import show_name
from saccade.checkpoint.index import SUFFIX
from saccade.checkpoint.open import JOURNAL
from saccade.convert.place import LOCK, PART_NAME
from saccade.errors import ConvertError

MOST_FILES = 100_000  # files; folders that link to each other may hold 2^n of them
KINDS = ((stat.S_ISFIFO, "pipe"), (stat.S_ISSOCK, "socket"), (stat.S_ISCHR, "device"), (stat.S_ISBLK, "device"))


class Other(NamedTuple):
    """A file that is copied."""

    name: str  # relative to the model's folder
    size: int  # bytes


class Others(NamedTuple):
    """What lies beside a model's tensors."""

    files: tuple[Other, ...]
    left_out: tuple[str, ...]  # tensors that are not the model's; hidden folders (version control, caches), NAME/


class Folder(NamedTuple):
    """A folder to look into, and those that it lies in."""

    name: str  # relative, "" for the model's own
    above: tuple[os.stat_result, ...]  # its own last


def find_others(root: Path, without: frozenset[str], out: Path) -> Others:
    """Everything below `root` but the names in `without`, and but what a conversion that was cut short left here: its
    journal and lock, files that never became whole. ConvertError that names what can neither be copied nor left out."""
    files: list[Other] = []
    left_out: list[str] = []
    refused: list[str] = []
    try:
        waiting = [Folder("", (os.stat(root),))]
    except OSError as e:
        raise ConvertError.at(root, f"cannot be read: {e.strerror}") from None
    while waiting and len(files) <= MOST_FILES:
        folder = waiting.pop()
        try:
            names = sorted(os.listdir(root / folder.name))
        except OSError as e:
            refused.append(f"{show_name(folder.name)} cannot be read: {e.strerror}")
            continue
        for name in names:
            relative = os.path.join(folder.name, name)
            if relative in without or name in (JOURNAL, LOCK) or fnmatchcase(name, PART_NAME.format("*")):
                continue
            if name.startswith(".") and os.path.isdir(root / relative):
                left_out.append(relative + "/")
                continue
            found = look_at(root, relative, folder, out)
            if isinstance(found, Folder):
                waiting.append(found)
            elif name.endswith((SUFFIX, SUFFIX + ".index.json")):
                left_out.append(relative)
            elif isinstance(found, Other):
                files.append(found)
            else:
                refused.append(f"{show_name(relative)} {found}")
    if len(files) > MOST_FILES:
        refused.append(f"its folders hold more than {MOST_FILES:,} files")
    if refused:
        more = f"; and {len(refused) - NAMED:,} more" if len(refused) > NAMED else ""
        raise ConvertError.at(
            root,
            f"cannot be copied whole: {'; '.join(refused[:NAMED])}{more}; nothing was written; "
            "mend or move away what is named",
        )
    return Others(tuple(sorted(files)), tuple(sorted(left_out)))


def look_at(root: Path, relative: str, folder: Folder, out: Path) -> Folder | Other | str:
    """What a name stands for, or the reason why it cannot be copied."""
    path = root / relative
    is_link = os.path.islink(path)
    try:
        found = os.stat(path)
        if stat.S_ISDIR(found.st_mode):
            if is_link and (loop := explain_loop(path, found, root, folder, out)):
                return loop
            return Folder(relative, (*folder.above, found))
        if not stat.S_ISREG(found.st_mode):
            kind = next((kind for test, kind in KINDS if test(found.st_mode)), "special file")
            return f"is a {kind}, which has no content to copy"
        os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC))  # may it be read?
        return Other(relative, found.st_size)
    except OSError as e:
        if is_link and e.errno == errno.ELOOP:
            return "is a link that leads back to itself"
        if is_link and e.errno in (errno.ENOENT, errno.ENOTDIR):
            return f"is a link to {show_name(os.readlink(path))}, which is not there"
        return f"cannot be read: {e.strerror}"


def explain_loop(path: Path, found: os.stat_result, root: Path, folder: Folder, out: Path) -> str | None:
    """Why a linked folder has no end: it holds the link, the model or the place that is written to."""
    there = path.resolve()
    for inside, text in ((root, "the model itself"), (out, "the result")):
        if there in (real := inside.resolve()).parents or there == real:
            return f"is a link to a folder that holds {text}"
    if any(is_same(found, above) for above in folder.above) or there in (root / folder.name).resolve().parents:
        return "is a link to a folder that it lies in"
    return None
