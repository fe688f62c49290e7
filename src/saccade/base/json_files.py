"""The JSON files beside a model: generation_config.json and the tokenizer's. Next: api/loading/side_files.py."""

from pathlib import Path
from stat import S_ISREG
from typing import Any

from saccade.base.strict_json import Json, read_json
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
        raise ConfigError.at(path, "expected a file, found a link to nothing") from None
    except OSError as error:
        raise ConfigError.at(path, f"cannot be read: {error.strerror}") from None
    if not is_regular:
        raise ConfigError.at(
            path, f"expected a regular file, found a {'directory' if path.is_dir() else 'device or pipe'}"
        )
    return True


def read_object(path: Path) -> Json | None:
    """The JSON object in a file, and what is odd about its text; None without the file. Raises ConfigError for anything
    else."""
    if not is_file_there(path):
        return None
    try:
        found = read_json(path.read_bytes())
    except OSError as error:
        raise ConfigError.at(path, f"cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError.at(path, f"expected JSON: {error}") from None
    if not isinstance(found.value, dict):
        raise ConfigError.at(path, f"expected a JSON object, found {type(found.value).__name__}")
    return found


def read_leniently(path: Path) -> tuple[dict[str, Any] | None, tuple[str, ...]]:
    """The JSON object in a file beside the model, {} without the file, None if it cannot be read; and notes: on that,
    on keys that stand twice, of which the last counts, as in every reader of these files, and on numbers that are no
    JSON."""
    try:
        found = read_object(path)
    except ConfigError as error:
        return None, (f"{error}; the file is not used",)
    if found is None:
        return {}, ()
    notes = []
    if found.repeated:
        notes.append(f"{path.name}: {show(', '.join(dict.fromkeys(found.repeated)))} stands twice; the last counts")
    if found.literals:
        notes.append(f"{path.name}: {', '.join(found.literals)}: no JSON number; other readers may refuse the file")
    return found.value, tuple(notes)
