"""A checkpoint's table of contents, from file headers only: which tensor lies where, and what is wrong with the files.

`read_index` reads no tensor byte (of 690 GB in 92,425 tensors: 23 MB, in 0.4 s) and needs no torch. It knows no model.
All that can be wrong becomes a Problem in the Index; only "there is nothing to open" is raised. Next: starts.py reads
headers, header.py parses them; remote.py builds the same Index over HTTP; plan/check.py reports the problems.
"""

import gc
import os
import stat
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from saccade.base.printable import escape, shorten
from saccade.checkpoint.header import HEADER_LIMIT, explain_pointer, is_name, parse_json, refuse_name, show_name
from saccade.checkpoint.header import Entry as Entry
from saccade.checkpoint.header import parse_header as parse_header
from saccade.checkpoint.starts import CONTROLS, Header, explain_control, mark_unfinished, read_start
from saccade.errors import CheckpointError, Problem

INDEX_FILE = "model.safetensors.index.json"
SUFFIX = ".safetensors"
PATH_SHOWN = 200  # characters of a path that the system refuses


class File(NamedTuple):
    """A file that is part of the checkpoint."""

    name: str
    size: int  # bytes on disk
    header_bytes: int  # 8 + header length
    tensors: int


class Unlisted(NamedTuple):
    """A file that index.json does not list; without an index.json, any file."""

    file: File
    entries: dict[str, Entry]
    problems: tuple[Problem, ...]
    known: int  # how many of its names index.json lists, for other files


@dataclass(frozen=True)
class Index:
    """Every tensor of a checkpoint by name. `entries` is only to be trusted while `problems` is empty."""

    root: str
    files: tuple[File, ...]
    entries: dict[str, Entry]
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]
    bytes_read: int
    has_list: bool = False  # whether an index.json says which files are the checkpoint
    unlisted: tuple[Unlisted, ...] = ()  # used or not
    listed: "Index | None" = None  # this Index without them; None if there are none

    def without(self, files: Collection[str], notes: Iterable[str]) -> "Index":
        """As if these of the unlisted files were not there; `notes` say why."""
        if self.listed is None:
            return self
        left = add_unlisted(self.listed, [u for u in self.unlisted if u.file.name not in files])
        return replace(left, notes=(*left.notes, *notes), bytes_read=self.bytes_read)

    @property
    def title(self) -> str:
        """`root` for a message: on one line, and nothing in it steers a terminal."""
        return escape(self.root)


def read_index(root: str | Path) -> Index:
    """The Index of a directory (its top level only) or of a single .safetensors file.

    CheckpointError if there is no such path, or no safetensors file in it.
    """
    try:
        path = Path(root).expanduser()
    except RuntimeError as e:  # ~somebody without a home
        raise CheckpointError(f"{shorten(str(root), PATH_SHOWN)}: {e}") from None
    try:
        is_directory = stat.S_ISDIR(path.stat().st_mode)
        names = sorted(os.listdir(path)) if is_directory else [path.name]
    except FileNotFoundError:
        raise CheckpointError(f"{escape(str(path))}: no such file or directory") from None
    except (OSError, ValueError) as e:
        text = f"cannot be opened: {getattr(e, 'strerror', e)}"
        raise CheckpointError(f"{shorten(str(path), PATH_SHOWN)}: {text}") from None
    if not is_directory and path.suffix != SUFFIX:
        raise CheckpointError(f"{escape(str(path))}: expected a directory or a {SUFFIX} file")
    folder = path if is_directory else path.parent
    files = [n for n in names if n.endswith(SUFFIX) and not n.startswith(".")]
    if not is_directory:
        names += [path.name + c for c in CONTROLS if os.path.exists(f"{path}{c}")]
    listing = None
    if is_directory and INDEX_FILE in names:
        listing = mark_unfinished(read_start(folder, INDEX_FILE, whole=True), names)
    if not files and listing is None:
        gguf = next((n for n in names if n.endswith(".gguf")), None)
        found = f" ({show_name(gguf)} is GGUF, which is not supported)" if gguf else ""
        raise CheckpointError(
            f"{escape(str(path))}: no {SUFFIX} file in it{found}; expected a model in the Hugging Face layout"
        )
    with paused_collector():
        return build_index(str(folder), listing, (mark_unfinished(read_start(folder, n), names) for n in files))


@contextmanager
def paused_collector() -> Iterator[None]:
    """Python's cycle collector walks the 92,425 new tuples again and again: it takes half of the time if left on."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def build_index(root: str, listing: Header | None, headers: Iterable[Header]) -> Index:
    """The Index out of index.json (`listing`, if there is one) and the headers of all top-level files.

    The files that index.json lists are the checkpoint. A file that it does not list is used if all its names are new
    (an MTP layer is often shipped so), left alone if all are known, and a problem if it is neither. Which of the new
    ones are none of the model's, plan/strays.py tells.
    """
    problems: list[Problem] = []
    notes: list[str] = []
    entries: dict[str, Entry] = {}
    files: list[File] = []
    if listing and listing.control:
        problems.append(explain_control(listing))
    weight_map = read_weight_map(listing, problems) if listing else None
    listed = Counter((weight_map or {}).values())  # tensors by file
    bytes_read = len(listing.raw) if listing else 0
    unlisted: list[Unlisted] = []
    present: set[str] = set()
    for header in headers:
        present.add(header.file)
        bytes_read += len(header.raw)
        if not is_name(header.file):
            problems.append(refuse_name(header.file, "the directory"))
            continue
        found, wrong = ({}, [header.problem]) if header.problem else parse_header(header.raw, header.file, header.size)
        if header.control:
            wrong = [*wrong, explain_control(header)]
        file = File(header.file, header.size, len(header.raw), len(found))
        if weight_map is None or header.file not in listed:
            unlisted.append(Unlisted(file, found, tuple(wrong), sum(name in (weight_map or {}) for name in found)))
            continue
        problems += wrong
        if found or not wrong:
            problems += compare_listing(header.file, found, {p.name for p in wrong}, weight_map, listed[header.file])
        files.append(file)
        problems += find_duplicates(header.file, found, entries)
        entries.update(found)
    firsts = {file: name for name, file in reversed((weight_map or {}).items())}
    for absent, count in listed.items():
        if absent not in present:
            first = firsts[absent]
            text = f"is listed by {INDEX_FILE} for {count} tensors ({first}, ...) but is not here; download it"
            problems.append(Problem("missing-file", absent, text))
    return add_unlisted(
        Index(root, tuple(files), entries, tuple(problems), tuple(notes), bytes_read, has_list=listing is not None),
        unlisted,
    )


def add_unlisted(listed: Index, unlisted: Sequence[Unlisted]) -> Index:
    """The Index with those of the unlisted files that are to be used."""
    if not unlisted:
        return listed
    files, entries = list(listed.files), dict(listed.entries)
    problems, notes = list(listed.problems), list(listed.notes)
    for file, found, wrong, known in unlisted:
        problems += [_add_cure(p) if listed.has_list and not found and p.name == file.name else p for p in wrong]
        if found and known == len(found):
            notes.append(f"{file.name} is not listed by {INDEX_FILE} and only repeats listed tensors: ignored")
        elif known:
            text = f"is not listed by {INDEX_FILE}; {known} of its {len(found)} tensors are known, the others new"
            text += ": expected all or none; remove one of the copies"
            problems.append(Problem("mixed-file", file.name, text))
        elif found or not listed.has_list:
            if listed.has_list:
                notes.append(f"{file.name} is not listed by {INDEX_FILE}; its {len(found)} tensors are new and used")
            files.append(file)
            problems.extend(find_duplicates(file.name, found, entries))
            entries.update(found)
        elif not wrong:
            notes.append(f"{file.name} is not listed by {INDEX_FILE} and holds no tensor: ignored")
    if not listed.has_list and len(files) > 1:
        notes.append(f"no {INDEX_FILE}: all {len(files)} {SUFFIX} files are used")
    return Index(
        listed.root, tuple(files), entries, tuple(problems), tuple(notes), listed.bytes_read, listed.has_list,
        tuple(unlisted), listed,
    )  # fmt: skip


def _add_cure(problem: Problem) -> Problem:
    """What a file holds that cannot be read, nobody knows: it may be a part of the model, as an MTP layer often is."""
    text = f"{problem.text} ({INDEX_FILE} does not list it: move it away if it is no part of the model)"
    return problem._replace(text=text)


def read_weight_map(listing: Header, problems: list[Problem]) -> dict[str, str] | None:
    """The tensor-to-file map of index.json; None, and a Problem, if it cannot be used at all."""

    def refuse(text: str) -> None:
        problems.append(Problem("index", listing.file, f"{text}; download it again"))

    if listing.problem:
        problems.append(listing.problem)
        return None
    if len(listing.raw) > HEADER_LIMIT:
        refuse(f"has more than {HEADER_LIMIT:,} bytes")
        return None
    if pointer := explain_pointer(listing.raw, listing.size):
        refuse(pointer)
        return None
    try:
        value, repeated = parse_json(listing.raw)
    except ValueError as e:
        refuse(f"is not JSON ({str(e)[:80]})")
        return None
    weight_map = value.get("weight_map") if isinstance(value, dict) else None
    if not isinstance(weight_map, dict) or not set(map(type, weight_map.values())) <= {str}:
        refuse("has no weight_map from tensor names to file names")
        return None
    for key in repeated:
        problems.append(Problem("duplicate", show_name(key), f"stands twice in {listing.file}; download it again"))
    for name in [n for n in weight_map if not is_name(n)]:
        problems.append(refuse_name(name, listing.file))
        del weight_map[name]
    wrong: set[str] = set()
    for file in sorted(set(weight_map.values())):
        if (
            not is_name(file)
            or not file.endswith(SUFFIX)
            or "/" in file
            or "\\" in file
            or "\0" in file
            or file.startswith(".")
        ):
            refuse(f"maps tensors to {ascii(file[:80])}, expected a {SUFFIX} file name without a directory")
            wrong.add(file)
    return {name: file for name, file in weight_map.items() if file not in wrong} if wrong else weight_map


def compare_listing(
    file: str, found: dict[str, Entry], wrong: set[str], weight_map: dict[str, str], count: int
) -> Iterator[Problem]:
    """Where index.json, which maps `count` tensors to `file`, and that file's header disagree.

    Names in `wrong` are in the header, but have a problem already.
    """
    strangers = [name for name in found if weight_map.get(name) != file]
    if len(found) - len(strangers) != count:
        for name in [n for n, f in weight_map.items() if f == file and n not in found and n not in wrong]:
            yield Problem("index", name, f"is in {file} by {INDEX_FILE}, but that file lacks it; download both again")
    for name in strangers:
        where = f"names {weight_map[name]} for it" if name in weight_map else "does not list it"
        yield Problem("index", name, f"is in {file}, but {INDEX_FILE} {where}; download both again")


def find_duplicates(file: str, found: dict[str, Entry], entries: dict[str, Entry]) -> Iterator[Problem]:
    """Names that another file holds too, folded by that file."""
    shared: dict[str, list[str]] = {}
    for name in found.keys() & entries.keys():
        shared.setdefault(entries[name].file, []).append(name)
    for other, names in shared.items():
        more = f" and {len(names) - 1} more tensors" if len(names) > 1 else ""
        text = f"holds {min(names)}{more} that {other} holds too; remove one of the copies"
        yield Problem("duplicate", file, text)
