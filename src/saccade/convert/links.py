"""Files of the source in which nothing changes: links to them instead of copies, where that can be.

A hard link is to the file that holds the bytes, also where the source is the Hub's cache, whose names are links. Both
folders share its bytes then, so no file of a result is ever written in place (place.py). Knows no tensor. Next:
convert.py, which asks beforehand and makes them.
"""

import os
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from saccade.base.disk import find_existing, is_same
from saccade.base.printable import escape
from saccade.base.values import show
from saccade.convert.changes import Output
from saccade.convert.place import Place
from saccade.errors import ConvertError, RequestError

HOWS = ("hard", "sym", "copy")
SPELLED = {"hard": "hard link", "sym": "symbolic link", "copy": "copy"}


class Links(NamedTuple):
    """Which files become links."""

    hows: dict[str, str]  # "hard" or "sym" by name; the others are copied
    reason: str = ""  # why some that could have been hard links are copied


class Ahead(NamedTuple):
    """What a conversion is about to do."""

    out: str
    source: str
    files: int  # with tensors, of the whole result
    kept: int  # of them from an earlier run
    changed: int  # files that are written anew
    changed_bytes: int
    whole: Counter[str]  # files in which nothing changes, by how they will be there
    whole_bytes: int
    reason: str


def check_link(link: str | None) -> None:
    if link is not None and link not in HOWS:
        raise RequestError(f"--link: expected one of {', '.join(HOWS)}, found {show(link)}")


def guess_links(root: Path, out: Path, outputs: Iterable[Output], link: str | None) -> Links:
    """Which files are likely to become links, before anything is written: those on the same file system."""
    if link == "copy":
        return Links({})
    hows = {}
    with suppress(OSError):
        device = os.stat(find_existing(out)).st_dev
        for output in outputs:
            if output.whole and (link is not None or os.stat(root / output.name).st_dev == device):
                hows[output.name] = link or "hard"
    return Links(hows)


def choose_links(root: Path, place: Place, outputs: Iterable[Output], link: str | None) -> Links:
    """Which files become links, each tried. ConvertError for one that cannot be what was asked for."""
    hows: dict[str, str] = {}
    reason = ""
    for output in outputs:
        if link == "copy" or not output.whole:
            continue
        how = link or "hard"
        refused = place.would_link(how, os.path.realpath(root / output.name))
        if refused is None:
            hows[output.name] = how
        elif link is None:
            reason = refused
        else:
            cure = "--link copy, or --link sym" if how == "hard" else "--link copy"
            text = f"cannot be a {SPELLED[how]} in {escape(str(place.out))}: {refused}; nothing was written; use {cure}"
            raise ConvertError.at(root / output.name, text)
    return Links(hows, reason)


def find_how(path: Path, source: Path) -> str:
    """How a whole file of a result is there."""
    if os.path.islink(path):
        return "sym"
    return "hard" if is_same(os.stat(path), os.stat(source)) else "copy"


def is_as_asked(path: Path, source: Path, link: str | None) -> bool:
    """Whether a whole file of an earlier run is there as `link` asks. A copy has one name: bytes that are shared with
    whatever else are none."""
    with suppress(OSError):
        how = find_how(path, source)
        if how == "sym" and os.path.realpath(path) != os.path.realpath(source):
            return False
        return link is None or (how == link and (how != "copy" or os.stat(path).st_nlink <= 1))
    return False


def look_ahead(outputs: Iterable[Output], todo: Iterable[Output], root: Path, out: Path, links: Links) -> Ahead:
    """What is about to be done, from what is planned and what is there."""
    outputs, todo = list(outputs), list(todo)
    changed = [output for output in todo if not output.whole]
    whole = [output for output in outputs if output.whole]
    pending = {output.name for output in todo}
    hows = (
        links.hows.get(o.name, "copy") if o.name in pending else find_how(out / o.name, root / o.name) for o in whole
    )
    return Ahead(
        out=str(out),
        source=str(root),
        files=len(outputs),
        kept=len(outputs) - len(todo),
        changed=len(changed),
        changed_bytes=sum(output.size for output in changed),
        whole=Counter(hows),
        whole_bytes=sum(output.size for output in whole),
        reason=links.reason,
    )
