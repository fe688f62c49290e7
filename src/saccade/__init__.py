"""Saccade: a small, fast inference engine for models with DeepSeek Sparse Attention.

The package root stays light: importing it loads no torch, so that `saccade check` answers at once.
`LLM` and `SamplingParams` are fetched on first use.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from saccade.llm import LLM
    from saccade.params import SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "LLM":
        from saccade.llm import LLM

        return LLM
    if name == "SamplingParams":
        from saccade.params import SamplingParams

        return SamplingParams
    raise AttributeError(f"module 'saccade' has no attribute {name!r}")
