"""A model as the user names it, a path or a Hugging Face id, becomes its config and its Index.

Reads headers only and needs no torch. What looks like a path is never sent to the network. Next: plan/__init__.py.
"""

import os
import re
import stat
from contextlib import suppress
from pathlib import Path

from saccade.checkpoint.coding import SUPPORTED
from saccade.checkpoint.header import show_name
from saccade.checkpoint.index import SUFFIX, Index, read_index
from saccade.config import ModelConfig, read_config
from saccade.errors import CheckpointError

GGUF = ".gguf"
ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95}", re.ASCII)

JOURNAL = ".saccade-convert.json"  # of a conversion: stands in its directory until it is finished


def open_model(model: str | Path, endpoint: str | None = None) -> tuple[ModelConfig, Index]:
    """The config and the Index of a directory, a .safetensors file beside its config.json, or "org/name" on the Hub.

    ConfigError or CheckpointError if there is nothing to open; faults of the files are in the Index's `problems`.
    """
    raw, source, index = open_raw(model, endpoint)
    return ModelConfig.from_json(raw, source), index


def open_raw(model: str | Path, endpoint: str | None = None) -> tuple[bytes, str, Index]:
    """As `open_model`, with config.json as its bytes and where they are from, so that all of its keys can be seen."""
    if str(model) == "":
        raise CheckpointError("expected a model directory or a Hugging Face id like org/name, found an empty name")
    if not looks_remote(model):
        mode = find_mode(model)
        gguf = None if mode is None else find_gguf(Path(model).expanduser())
        if gguf is not None:
            what = "is GGUF" if gguf == "" else f"holds {show_name(gguf)}, which is GGUF"
            text = f"{what} and not supported; expected {SUFFIX} files in the Hugging Face layout ({SUPPORTED})"
            raise CheckpointError(f"{show_name(str(model))}: {text}")
        if mode is None or not (stat.S_ISDIR(mode) or Path(model).suffix == SUFFIX):
            found = "no such directory" if mode is None else "is not a directory"
            text = f"{found}; expected a model directory or a Hugging Face id like org/name"
            raise CheckpointError(f"{show_name(str(model))}: {text}")
        path = Path(model).expanduser()
        folder = path if stat.S_ISDIR(mode) else path.parent
        if (folder / JOURNAL).exists() and not (folder / "config.json").exists():  # it is written last
            text = "" if folder == path else f"is in {show_name(str(folder))}, which "
            text += "holds an unfinished conversion; the same saccade convert command goes on where it stopped"
            raise CheckpointError(f"{show_name(str(model))}: {text}")
        return *read_config(folder), read_index(path)
    from saccade.checkpoint.remote import read_remote

    config, index = read_remote(str(model), endpoint=endpoint)
    return config, f"{model}/config.json", index


def find_gguf(path: Path) -> str | None:
    """ "" if a path is a GGUF file, the name of one if it is a directory that holds such files and no model."""
    if not path.is_dir():
        return "" if path.suffix == GGUF else None
    with suppress(OSError):  # whoever reads the directory says so
        names = os.listdir(path)
        if not any(name.endswith((SUFFIX, SUFFIX + ".index.json")) for name in names):
            return next((name for name in sorted(names) if name.endswith(GGUF)), None)
    return None


def looks_remote(model: str | Path) -> bool:
    """Whether `model` is an id to look up on the Hub: a string org/name, and no path of that name exists.

    CheckpointError if it cannot be told whether there is such a path.
    """
    if isinstance(model, Path) or not ID.fullmatch(model) or model.endswith((SUFFIX, ".json")):
        return False
    return find_mode(model) is None


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
