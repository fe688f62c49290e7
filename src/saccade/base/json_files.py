"""The JSON files beside a model: generation_config.json and the tokenizer's. Next: api/side_files.py."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from stat import S_ISREG
from typing import Any

from saccade.base.values import show
from saccade.errors import ConfigError


def is_file_there(path: Path) -> bool:
    """False if there is nothing at `path`. Raises ConfigError for what is there but no file that can be read: a
    directory, a dangling link, a pipe that would be waited for."""
    try:
        is_regular = S_ISREG(path.stat().st_mode)
    except FileNotFoundError:
        if not path.is_symlink():
            return False
        raise ConfigError(f"{path}: expected a file, found a link to nothing") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    if not is_regular:
        raise ConfigError(
            f"{path}: expected a regular file, found a {'directory' if path.is_dir() else 'device or pipe'}"
        )
    return True


def read_object(path: Path, hook: Callable[[list[tuple[str, Any]]], Any] | None = None) -> dict[str, Any] | None:
    """The JSON object in a file, None without the file. Raises ConfigError for anything else."""
    if not is_file_there(path):
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=hook)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: expected JSON: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(values).__name__}")
    return values


def read_leniently(path: Path) -> tuple[dict[str, Any] | None, tuple[str, ...]]:
    """The JSON object in a file beside the model, {} without the file, None if it cannot be read; and notes on that, or
    on keys that stand twice: the last counts, as in every reader of these files."""
    repeated: dict[str, None] = {}

    def keep(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            repeated.update((name, None) for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        return found

    try:
        values = read_object(path, keep)
    except ConfigError as error:
        return None, (f"{error}; the file is not used",)
    notes = (f"{path.name}: {show(', '.join(repeated))} stands twice; the last counts",) if repeated else ()
    return values or {}, notes
