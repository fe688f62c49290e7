"""Copies of the bundled checkpoint in which something is changed."""

import json
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from saccade.checkpoint.open import bundled_path

Change = Callable[[str, Tensor], Tensor]


def write_copy(folder: Path, change: Change, **config: object) -> Path:
    """The bundled checkpoint with some tensors or config keys changed."""
    for path in bundled_path().iterdir():
        if path.suffix == ".safetensors":
            tensors = {name: change(name, tensor) for name, tensor in load_file(path).items()}
            save_file(tensors, folder / path.name)
        else:
            (folder / path.name).write_bytes(path.read_bytes())
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | config))
    return folder
