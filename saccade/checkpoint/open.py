"""A model as the user names it, a path or a Hugging Face id, becomes its config and its Index.

Reads headers only and needs no torch. What looks like a path is never sent to the network. Next: plan/__init__.py.
"""

import re
from pathlib import Path

from saccade.checkpoint.index import SUFFIX, Index, read_index
from saccade.config import ModelConfig
from saccade.errors import CheckpointError

ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95}", re.ASCII)


def open_model(model: str | Path, endpoint: str | None = None) -> tuple[ModelConfig, Index]:
    """The config and the Index of a directory, a .safetensors file beside its config.json, or "org/name" on the Hub.

    ConfigError or CheckpointError if there is nothing to open; faults of the files are in the Index's `problems`.
    """
    if not looks_remote(model):
        path = Path(model).expanduser()
        if not path.is_dir() and path.suffix == SUFFIX and path.exists():
            return ModelConfig.load(path.parent), read_index(path)
        if not path.is_dir():
            found = "is not a directory" if path.exists() else "no such directory"
            raise CheckpointError(f"{model}: {found}; expected a model directory or a Hugging Face id like org/name")
        return ModelConfig.load(path), read_index(path)
    from saccade.checkpoint.remote import read_remote

    config, index = read_remote(str(model), endpoint=endpoint)
    return ModelConfig.from_json(config, f"{model}/config.json"), index


def looks_remote(model: str | Path) -> bool:
    """Whether `model` is an id to look up on the Hub: a string org/name, and no path of that name exists."""
    if isinstance(model, Path) or not ID.fullmatch(model) or model.endswith((SUFFIX, ".json")):
        return False
    return not Path(model).exists()


def bundled_path() -> Path:
    """The directory of the small checkpoint that comes with the package."""
    return Path(__file__).parent.parent / "bundled"
