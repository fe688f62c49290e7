"""Hugging Face's download cache: where a repository's files lie on this machine, as huggingface_hub lays them out.

models--org--name/refs/<revision> holds a commit, snapshots/<commit>/ links files to their contents in blobs/. Knows no
network. Next: fetch.py, which fills it; open.py, which reads from it.
"""

import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from saccade.base.values import show
from saccade.errors import CheckpointError

Tell = Callable[[str], None]  # hears of long waits, in words
REVISION = re.compile(r"[A-Za-z0-9_][\w.+-]*(/[A-Za-z0-9_][\w.+-]*)*", re.ASCII)


def check_revision(name: str, revision: str | None) -> str:
    """The branch, tag or commit asked for: "main" for None. CheckpointError for what cannot be one."""
    if revision is None:
        return "main"
    if not isinstance(revision, str) or len(revision) > 250 or ".." in revision or not REVISION.fullmatch(revision):
        raise CheckpointError(f"{name}: expected a branch, a tag or a commit as revision, found {show(revision)}")
    return revision


def read_environment() -> Any:
    """What huggingface_hub makes of its environment variables: its `constants`. CheckpointError if it stumbles."""
    try:
        from huggingface_hub import constants
    except ImportError:
        raise
    except Exception as error:  # HF_HUB_DOWNLOAD_TIMEOUT=10s, for one
        text = "an environment variable of huggingface_hub (HF_...) has a value that it cannot use"
        raise CheckpointError(f"{text}: {' '.join(str(error).split())[:200]}") from error
    return constants


def find_cache(name: str) -> Path:
    """The cache of one repository: in HF_HUB_CACHE, or in hub/ below HF_HOME."""
    return Path(read_environment().HF_HUB_CACHE).expanduser() / f"models--{name.replace('/', '--')}"


def find_snapshot(name: str, revision: str) -> Path | None:
    """The folder of a branch, tag or commit as it was last downloaded, whole or in part; None if it never was."""
    cache = find_cache(name)
    commit = revision
    with suppress(OSError, ValueError):  # no such file: a commit by itself, perhaps
        commit = (cache / "refs" / revision).read_text(encoding="ascii").strip()
    folder = cache / "snapshots" / commit
    try:
        return folder if is_commit(commit) and folder.is_dir() else None
    except OSError:  # may not be looked at
        return None


def is_commit(text: str) -> bool:
    """Whether this may be a folder's name below snapshots/."""
    return re.fullmatch(r"[0-9A-Za-z_][\w.-]{0,99}", text, re.ASCII) is not None and ".." not in text


def note_revision(name: str, revision: str, commit: str) -> None:
    """Keep which commit a branch or tag meant, for times without network; a cache that is read-only stays as it is."""
    if revision == commit:
        return
    path = find_cache(name) / "refs" / revision
    with suppress(OSError):
        if path.is_file() and path.read_text(encoding="utf-8") == commit:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        partial.write_text(commit, encoding="ascii")
        os.replace(partial, path)
