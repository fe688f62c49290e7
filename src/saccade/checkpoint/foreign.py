"""Folders that hold no model for this reader: other formats, adapters, tokenizers, a model in a folder below. Says what
they hold and what to do.

Names only: no file is opened. Next: open.py, which asks before it reads.
"""

import os
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from saccade.base.values import show_count
from saccade.checkpoint.coding import SUPPORTED
from saccade.checkpoint.header import show_name
from saccade.checkpoint.index import SUFFIX

EXPECTED = f"expected {SUFFIX} files in the Hugging Face layout"
ADAPTER = re.compile(r"adapter_(config\.json|model.*\.(safetensors|bin))")
FORMATS = (  # by a file's name, what it is; the first that fits
    (re.compile(r".*\.gguf"), "GGUF"),
    (re.compile(r".*\.(bin|pt|pth|ckpt)"), "PyTorch's pickle format, which can run code when it is opened,"),
    (re.compile(r".*\.(h5|ckpt\.index|ckpt\.data.*)|saved_model\.pb"), "TensorFlow's format"),
    (re.compile(r".*\.msgpack"), "Flax's format"),
    (re.compile(r".*\.onnx(_data)?"), "ONNX"),
    (re.compile(r".*\.npz"), "NumPy's format"),
)
TOKENIZER = re.compile(r"tokenizer.*|vocab\.(json|txt)|merges\.txt|.*\.tiktoken|special_tokens_map\.json")
LOOKED_INTO = 200  # folders below
NAMED = 3  # names in an error


def describe_file(name: str) -> str | None:
    """What a file is that was named as a model, if its name says that it is none; what should be done about it."""
    if ADAPTER.fullmatch(name):
        return describe_adapter("is")
    what = next((what for pattern, what in FORMATS if pattern.fullmatch(name)), None)
    return None if what is None else f"is {what} and not supported; {cure(what)}"


def describe_names(names: Iterable[str]) -> str | None:
    """As `describe_file`, of all names at the top of a folder or a repository. None if a model's files are there."""
    names = sorted(name for name in names if not name.startswith("."))
    weights = [name for name in names if name.endswith((SUFFIX, SUFFIX + ".index.json"))]
    adapters = [name for name in names if ADAPTER.fullmatch(name)]
    if any(name not in adapters for name in weights):
        return None
    if adapters:
        return describe_adapter(f"holds {show_name(adapters[0])},")
    for pattern, what in FORMATS:
        found = next((name for name in names if pattern.fullmatch(name)), None)
        if found is not None:
            return f"holds {show_name(found)}, which is {what} and not supported; {cure(what)}"
    has_config = "config.json" in names
    tokenizer = next((name for name in names if TOKENIZER.fullmatch(name)), None)
    if has_config or tokenizer is not None:
        what = "config.json" if has_config else f"a tokenizer ({show_name(str(tokenizer))})"
        return f"holds {what} but no {SUFFIX} file with weights; `hf download` fetches what is missing"
    return f"holds no {SUFFIX} file; {EXPECTED}" if names else f"is empty; {EXPECTED}"


def describe_adapter(verb: str) -> str:
    text = "a LoRA adapter, which changes another model and is none by itself"
    return f"{verb} {text}; merge it into its base model first (peft: merge_and_unload, then save_pretrained)"


def cure(what: str) -> str:
    if what == "GGUF":
        return f"{EXPECTED} ({SUPPORTED}): take the repository that the file was made of"
    return f"{EXPECTED}: transformers writes them (from_pretrained, then save_pretrained)"


def describe_folder(folder: Path) -> str | None:
    """As `describe_names`; a folder below that holds a model is named. None too if the folder cannot be listed."""
    with suppress(OSError):  # whoever reads it says so
        text = describe_names(os.listdir(folder))
        if text is not None:
            below = find_below(folder)
            if len(below) == 1:
                return f"holds no model itself, but its folder {show_name(below[0])} does: name that"
            if below:
                shown = ", ".join(map(show_name, below[:NAMED])) + (", ..." if len(below) > NAMED else "")
                return f"holds no model itself, but {show_count(len(below), 'folder')} below do: name one ({shown})"
        return text
    return None


def find_below(folder: Path) -> list[str]:
    """Folders at most two levels down with a model in them, as a download cache has it in snapshots/COMMIT."""
    found, level = list[str](), [""]
    for _ in range(2):
        deeper = []
        for above in level:
            with suppress(OSError), os.scandir(folder / above) as entries:
                deeper += [os.path.join(above, e.name) for e in entries if e.is_dir() and not e.name.startswith(".")]
        level = sorted(deeper)[:LOOKED_INTO]
        for name in level:
            with suppress(OSError):
                if describe_names(os.listdir(folder / name)) is None:
                    found.append(name)
    return found
