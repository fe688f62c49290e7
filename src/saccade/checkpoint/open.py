"""A model as the user names it, a path or a Hugging Face id, becomes its config and its Index.

Reads headers only and needs no torch. What looks like a path is never sent to the network; what was asked for by id
and cannot be had there is read in the download cache. Next: plan/__init__.py.
"""

import os
import re
import stat
from pathlib import Path

from saccade.base.values import show
from saccade.checkpoint.foreign import describe_file, describe_folder
from saccade.checkpoint.header import show_name
from saccade.checkpoint.hub.snapshot import Tell, check_revision, find_snapshot, read_environment
from saccade.checkpoint.index import SUFFIX, Index, read_index
from saccade.config.file import Config, read_config
from saccade.errors import CheckpointError, ConfigError
from saccade.models.registry import make_config

GGUF = ".gguf"
ID = re.compile(r"[A-Za-z0-9]([\w.-]*\w)?/\w([\w.-]*\w)?", re.ASCII)  # of huggingface_hub's rules the strict reading
ID_LENGTH = 96

Opened = tuple[bytes, str, Index]  # config.json, its name for errors, the headers

JOURNAL = ".saccade-convert.json"  # of a conversion: stands in its directory until it is finished


def open_model(
    model: str | Path, endpoint: str | None = None, revision: str | None = None, tell: Tell = lambda _: None
) -> tuple[Config, Index]:
    """The config and the Index of a directory, a .safetensors file beside its config.json, or "org/name" on the Hub at
    `revision`. `tell` hears of long waits, and of what was read in the download cache because the Hub is out of reach.

    ConfigError or CheckpointError if there is nothing to open; faults of the files are in the Index's `problems`.
    """
    raw, source, index = open_raw(model, endpoint, revision, tell)
    return make_config(raw, source), index


def open_raw(
    model: str | Path, endpoint: str | None = None, revision: str | None = None, tell: Tell = lambda _: None
) -> Opened:
    """As `open_model`, with config.json as its bytes and where they are from, so that all of its keys can be seen."""
    if str(model) == "":
        raise CheckpointError("expected a model directory or a Hugging Face id like org/name, found an empty name")
    if not looks_remote(model) and revision is not None:
        text = f"revision: only a Hugging Face id has revisions, found {show(revision)} with a path"
        raise CheckpointError(f"{show_name(str(model))}: {text}")
    if not looks_remote(model):
        mode = find_mode(model)
        if mode is None:
            text = "no such directory; expected a model directory or a Hugging Face id like org/name"
            raise CheckpointError(f"{show_name(str(model))}: {text}")
        path = Path(model).expanduser()
        folder = path if stat.S_ISDIR(mode) else path.parent
        if (folder / JOURNAL).exists() and not (folder / "config.json").exists():  # it is written last
            text = "" if folder == path else f"is in {show_name(str(folder))}, which "
            text += "holds an unfinished conversion; the same saccade convert command goes on where it stopped"
            raise CheckpointError(f"{show_name(str(model))}: {text}")
        foreign = describe_folder(path) if folder == path else describe_file(path.name)
        if foreign is None and folder != path and path.suffix != SUFFIX:
            in_model = describe_folder(folder) is None and stat.S_ISREG(mode)
            found = f"is one file of a model: name its directory, {show_name(str(folder))}" if in_model else ""
            foreign = found or "is not a directory; expected a model directory or a Hugging Face id like org/name"
        if foreign is not None:
            raise CheckpointError(f"{show_name(str(model))}: {foreign}")
        return *read_config(folder), read_index(path)
    name, revision = str(model), check_revision(str(model), revision)
    if is_offline(endpoint):
        return open_cached(name, revision, "HF_HUB_OFFLINE is set", tell)
    from saccade.checkpoint.hub.remote import read_remote
    from saccade.checkpoint.hub.web import Unreachable

    try:
        config, index = read_remote(name, revision, endpoint, tell=tell)
    except Unreachable as error:
        if find_snapshot(name, revision) is None:
            raise
        return open_cached(name, revision, str(error), tell)
    return config, f"{model}/config.json", index


def open_cached(name: str, revision: str, why: str, tell: Tell) -> Opened:
    """What the download cache holds of an id. CheckpointError, with `why` the Hub was not asked, if that is no model;
    `tell` hears which commit is read."""
    folder = find_snapshot(name, revision)
    if folder is None:
        of = "" if revision == "main" else f" at revision {revision}"
        raise CheckpointError(f"{name}: no such path, not in the download cache{of}, and {why}")
    try:
        config, source = read_config(folder)
        opened = config, source, read_index(folder)
    except (ConfigError, CheckpointError):
        raise CheckpointError(f"{name}: only a part of it is in the download cache ({folder}), and {why}") from None
    if not why.startswith("HF_"):  # nobody asked for this
        tell(f"note: {why}")
    tell(f"note: {name} is read in the download cache, at commit {folder.name}")
    return opened


def is_offline(endpoint: str | None = None) -> bool:
    """Whether the environment forbids to ask the Hub, and no other server is named."""
    return bool(read_environment().HF_HUB_OFFLINE) and endpoint is None


def looks_remote(model: str | Path) -> bool:
    """Whether `model` is an id to look up on the Hub: a string org/name, and no path of that name exists.

    CheckpointError if it cannot be told whether there is such a path.
    """
    if isinstance(model, Path) or not is_id(model):
        return False
    return find_mode(model) is None


def is_id(text: str) -> bool:
    """Whether the Hub may have a model of this name. It refuses what has "--" or "..", or ends in ".git"."""
    return (
        len(text) <= ID_LENGTH
        and ID.fullmatch(text) is not None
        and not any(part in text for part in ("--", ".."))
        and not text.endswith((SUFFIX, ".json", ".git", GGUF))
    )


def find_mode(model: str | Path) -> int | None:
    """What is at a path, as `os.stat` puts it; None for nothing, CheckpointError if the system refuses to say."""
    try:
        return os.stat(Path(model).expanduser()).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RuntimeError) as e:  # too long, not searchable; a NUL byte; ~somebody without a home
        reason = getattr(e, "strerror", e)
        raise CheckpointError(f"{show_name(str(model))}: cannot be opened: {reason}") from None


def bundled_path() -> Path:
    """The directory of the small checkpoint that comes with the package."""
    return Path(__file__).parent.parent / "bundled"
