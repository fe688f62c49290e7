"""config.json, read strictly as a JSON object; and what the config of every model family says.

Which keys there are, and what they mean, is a family's: models/dsa/config.py. Next: models/registry.py, which finds the
family of a model_type.
"""

import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from saccade.base.printable import escape, shorten
from saccade.base.strict_json import read_json
from saccade.config.keys import show_json
from saccade.errors import ConfigError

KEYS_LIMIT = 4096  # the published ones have 30 to 60
CONFIG_BYTES = 16 << 20  # the published ones have 2 to 40 kB


class Config(Protocol):
    """What all but a family's own folder may ask of a config. The MTP layer, if there is one, is layer
    `num_hidden_layers`."""

    @property
    def model_type(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def num_nextn_predict_layers(self) -> int | None: ...  # None: the config does not say
    @property
    def index_topk(self) -> int: ...  # tokens of a selection
    @property
    def index_share_for_mtp_iteration(self) -> bool: ...  # whether later drafts reuse the first one's selection
    @property
    def max_position_embeddings(self) -> int: ...
    @property
    def eos_token_ids(self) -> tuple[int, ...]: ...
    @property
    def scale_fmt(self) -> str | None: ...  # what quantization_config claims; shown, never believed
    @property
    def notes(self) -> tuple[str, ...]: ...


def read_config(path: str | Path) -> tuple[bytes, str]:
    """The bytes of config.json, given as a file or as the directory it is in, and its path. ConfigError if it cannot be
    read."""
    file = Path(path)
    try:
        file = file.expanduser()
        if file.is_dir():
            file = file / "config.json"
        if not stat.S_ISREG(file.stat().st_mode):  # before open(), which would wait on a pipe
            raise ConfigError(f"{escape(str(file))}: not a regular file; a model directory needs a config.json")
        with file.open("rb") as f:
            raw = f.read(CONFIG_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(f"{escape(str(file))}: no such file; a model directory needs a config.json") from None
    except (OSError, ValueError, RuntimeError) as e:  # a NUL byte in a path; ~somebody without a home
        raise ConfigError(f"{shorten(str(file), 200)}: cannot be read: {getattr(e, 'strerror', e)}") from None
    return raw, escape(str(file))


def parse_config(raw: bytes, source: str) -> tuple[Any, tuple[str, ...]]:
    """The JSON value in the bytes of a config.json, and notes on it; `source` names the file in errors."""
    if len(raw) > CONFIG_BYTES:
        raise ConfigError.at(source, f"larger than {CONFIG_BYTES >> 20} MiB, so it is not a config")
    try:
        values, repeated, literals = read_json(raw)
    except ValueError as e:
        raise ConfigError.at(source, f"not JSON ({e}); write or download it again") from None
    if repeated:
        named = ", ".join(shorten(key, 60) for key in dict.fromkeys(repeated))
        text = "which value is meant is unknown; leave one, or download the file again"
        raise ConfigError.at(source, f"stands twice in one object: {shorten(named, 200)}; {text}")
    notes = (f"config.json: {', '.join(literals)} is no JSON; other programs refuse the file",) if literals else ()
    return values, notes


def find_model_type(values: Any, source: str, supported: Iterable[str]) -> str:
    """The model_type of a config.json's contents, one of those `supported`. ConfigError for anything else."""
    if not isinstance(values, Mapping):
        raise ConfigError.at(source, f"expected a JSON object, found {type(values).__name__}")
    if len(values) > KEYS_LIMIT:
        raise ConfigError.at(source, f"has {len(values):,} keys, expected at most {KEYS_LIMIT:,}: it is not a config")
    found, supported = values.get("model_type"), tuple(supported)
    if isinstance(found, str) and found in supported:
        return found
    kind = ", an architecture that is not implemented" if isinstance(found, str) else ""
    raise ConfigError.at(source, f"model_type is {show_json(found)}{kind}; supported: {', '.join(supported)}")
