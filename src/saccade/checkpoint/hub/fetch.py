"""A checkpoint on this machine: where a path points, or fetched from the Hub into its download cache.

Headers first: `open_source` knows config, Index and the small files of a model whose weights may still be on the Hub,
so that whoever wants it can refuse before 690 GB are fetched; `fetch_weights` gets those. Only files that are read are
fetched. Knows no torch and no tensor. Next: download.py, one file; open.py, which only wants the headers.
"""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from saccade.checkpoint.header import is_name
from saccade.checkpoint.hub.download import Counter, fetch_file, naming_disk
from saccade.checkpoint.hub.remote import Repository, open_repository, read_repository
from saccade.checkpoint.hub.snapshot import check_revision, find_cache, find_snapshot, is_commit, note_revision
from saccade.checkpoint.hub.web import Tell, Unreachable, work_through
from saccade.checkpoint.index import INDEX_FILE, SUFFIX, Index
from saccade.checkpoint.open import Opened, bundled_path, is_offline, looks_remote, open_cached, open_raw
from saccade.config.file import Config
from saccade.errors import CheckpointError
from saccade.models.registry import make_config

Progress = Callable[[int, int], None]  # bytes done, bytes in all

READ = (  # beside the weights: what text needs, and what samples
    "config.json", INDEX_FILE, "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
)  # fmt: skip
KEPT_SUFFIXES = (
    ".json",
    ".jinja",
    ".txt",
    ".model",
    ".tiktoken",
    ".py",
    ".md",
)  # by `convert`, beside what is read here
SMALL = 64 << 20  # bytes; a file of such a kind that has more is none of them


@dataclass(frozen=True)
class Source:
    """A checkpoint by its headers. All but `missing` lies at `root`, a directory or a .safetensors file."""

    raw: bytes  # config.json
    where: str  # that file's name for errors
    index: Index
    root: Path
    missing: tuple[str, ...] = ()  # weight files that are to be fetched
    name: str = ""  # the Hugging Face id, if it is one
    commit: str = ""
    endpoint: str | None = None
    tell: Tell = field(default=lambda _: None, compare=False)

    @property
    def config(self) -> Config:
        """ConfigError for a model that cannot be run."""
        return make_config(self.raw, self.where)

    def keep(self, index: Index) -> "Source":
        """The same without what `index` has left out (a plan's has no files of something else): it is not fetched."""
        files = {file.name for file in index.files}
        return replace(self, index=index, missing=tuple(file for file in self.missing if file in files))

    @property
    def directory(self) -> Path:
        """Where the small files are."""
        return self.root.parent if self.root.suffix == SUFFIX and not self.root.is_dir() else self.root


def open_source(
    path: str | Path | None,
    revision: str | None = None,
    tell: Tell = lambda _: None,
    endpoint: str | None = None,
    everything: bool = False,
) -> Source:
    """The headers of a path, of the bundled checkpoint for None, or of a Hugging Face id at `revision`, whose small
    files are fetched into the download cache (with `everything`, those that only a copy needs as well).

    Offline, or while the Hub cannot be reached, what the cache holds is used; `tell` hears of it. Raises
    CheckpointError if there is nothing to open, or an id cannot be had.
    """
    if path is None:
        path = bundled_path()
    if not looks_remote(path):
        return Source(*open_raw(path, revision=revision), Path(path).expanduser())
    name = str(path)
    revision = check_revision(name, revision)
    if is_offline(endpoint):
        return as_source(open_cached(name, revision, "HF_HUB_OFFLINE is set", tell), name)
    try:
        with open_repository(name, revision, endpoint, tell=tell) as repository:
            raw, index = read_repository(repository)
            make_config(raw, f"{name}/config.json")  # refuses another model before anything is kept of it
            side = [file for file in repository.sizes if file in READ or (everything and is_kept(repository, file))]
            folder = fetch_files(repository, side, lambda *_: None)
            missing = tuple(file.name for file in index.files if repository.find_cached(file.name) is None)
            note_revision(name, revision, repository.commit)
            where = f"{name}/config.json"
            return Source(raw, where, index, folder, missing, name, repository.commit, endpoint, tell)
    except Unreachable as error:
        if find_snapshot(name, revision) is None:
            raise
        return as_source(open_cached(name, revision, str(error), tell), name)


def as_source(opened: Opened, name: str) -> Source:
    return Source(*opened, Path(opened[2].root), name=name)


def is_kept(repository: Repository, file: str) -> bool:
    """Whether a copy of the model should have a top-level file that nothing here reads: licences, other tokenizers."""
    is_small = (repository.sizes.get(file) or 0) <= SMALL
    return is_small and (file.endswith(KEPT_SUFFIXES) or "." not in file) and not file.endswith(".index.json")


def fetch_weights(source: Source, progress: Progress | None = None) -> Path:
    """The local path of a source, after all that is missing has been fetched. Cut short, it goes on where it stopped.

    CheckpointError if that cannot be done; before the first byte, if the disk has no room for all.
    """
    if source.missing:
        with open_repository(source.name, source.commit, source.endpoint, tell=source.tell) as repository:
            lost = [file for file in source.missing if file not in repository.sizes]
            if lost:
                raise CheckpointError(f"{source.name}: {lost[0]} is no longer there; run the same command again")
            fetch_files(repository, list(source.missing), progress or (lambda *_: None))
    return source.root


def fetch_checkpoint(
    path: str | Path | None,
    revision: str | None = None,
    tell: Tell = lambda _: None,
    before: Callable[[Source], Source] = lambda source: source,
    everything: bool = False,
    progress: Progress | None = None,
) -> Path:
    """The local path of a checkpoint, all of it: `open_source`, then `before`, which may refuse or leave files out,
    then `fetch_weights`."""
    return fetch_weights(before(open_source(path, revision, tell, everything=everything)), progress)


def fetch_files(repository: Repository, files: list[str], progress: Progress) -> Path:
    """The folder of the repository's commit in the download cache, after `files` have been fetched into it."""
    name, cache = repository.name, find_cache(repository.name)
    if not is_commit(repository.commit):
        raise CheckpointError(f"{name}: {repository.site.endpoint} names the commit {ascii(repository.commit[:60])}")
    folder = repository.folder = cache / "snapshots" / repository.commit
    todo = [file for file in files if repository.find_cached(file) is None]
    if not todo:
        return folder
    for file in todo:
        if not is_name(file) or "\\" in file or file.startswith("."):
            raise CheckpointError(f"{name}: lists a file named {ascii(file[:80])}, which cannot be kept here")
    with naming_disk(name, cache):
        (cache / "blobs").mkdir(parents=True, exist_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
    counter = Counter(sum(repository.sizes.get(file) or 0 for file in todo), progress)
    require_cache_space(repository, cache, todo)
    work_through(repository.site, todo, lambda file: fetch_file(repository, file, cache, folder, counter))
    return folder


def require_cache_space(repository: Repository, cache: Path, todo: list[str]) -> None:
    """CheckpointError if the disk has no room for files that are to be fetched, less what is there of them."""
    needed = 0
    for file in todo:
        blob = cache / "blobs" / (repository.blobs.get(file) or "")
        there = [p.stat().st_size for p in (blob, Path(f"{blob}.incomplete")) if p.is_file()]
        needed += max(0, (repository.sizes.get(file) or 0) - max(there, default=0))
    try:
        free = shutil.disk_usage(os.path.realpath(cache)).free
    except OSError:  # a file system that does not say: it will when it is full
        return
    if needed > free:
        text = f"{repository.name}: {needed:,} bytes are to be fetched into {cache}, where {free:,} are free"
        raise CheckpointError(f"{text}; make room, or set HF_HOME to a folder on a larger disk")
