"""Saccade: a small, fast inference engine for models with DeepSeek Sparse Attention.

    from saccade import LLM, SamplingParams

    llm = LLM("path/to/model")  # or a Hugging Face id; without one: the small model that comes with the package
    for out in llm.generate(["Tom has 12 apples."], SamplingParams(max_tokens=64)):
        print(out.text)

`LLM` runs a model, `SamplingParams` says how tokens are chosen, `Completion` and `Piece` are what comes out, and every
error that a user can mend is a `SaccadeError`. The package root stays light: importing it loads no torch, so that
`saccade check` answers at once; names are fetched on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from saccade.api.chat import ChatCompletion, ChatPiece
    from saccade.api.llm import LLM
    from saccade.api.outputs import Completion, Piece
    from saccade.api.selection_file import SelectionReader
    from saccade.chat.types import ChatOptions
    from saccade.engine.params import SamplingParams
    from saccade.errors import (
        CheckpointError,
        ConfigError,
        ContentsError,
        ConvertError,
        LoadError,
        MemoryRefusedError,
        MissingPackageError,
        NoAnswerError,
        NumericsError,
        PlanError,
        RankError,
        RequestError,
        SaccadeError,
    )

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "ChatCompletion",
    "ChatOptions",
    "ChatPiece",
    "CheckpointError",
    "Completion",
    "ConfigError",
    "ContentsError",
    "ConvertError",
    "LoadError",
    "MemoryRefusedError",
    "MissingPackageError",
    "NoAnswerError",
    "NumericsError",
    "Piece",
    "PlanError",
    "RankError",
    "RequestError",
    "SaccadeError",
    "SamplingParams",
    "SelectionReader",
    "__version__",
]
_PLACES = {
    "LLM": "api.llm",
    "SamplingParams": "engine.params",
    "ChatCompletion": "api.chat",
    "ChatOptions": "chat.types",
    "ChatPiece": "api.chat",
    "Completion": "api.outputs",
    "Piece": "api.outputs",
    "SelectionReader": "api.selection_file",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'saccade' has no attribute {name!r}")
    errors = import_module("saccade.errors")
    place = f"saccade.{_PLACES.get(name, 'errors')}"
    try:
        if place in ("saccade.api.llm", "saccade.api.outputs", "saccade.api.chat"):  # which import torch
            with import_module("saccade.api.settings.threads").sleeping_threads():
                import_module(place)
        value = getattr(import_module(place), name)
    except ModuleNotFoundError as error:
        raise errors.explain_missing(error, f"saccade.{name}") from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
