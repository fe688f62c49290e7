"""Triton's keys of compiled kernels, made the same whichever kernel is launched first.

The key of a kernel holds the constants of the functions that it calls. Triton 3.6 looks for them before it has found
those of the called function, so they are only there if another kernel has asked for that function before: after another
order of launches the same kernel has another key, and is compiled again. Here the called function comes first, as in
later versions. In a start whose kernels other processes compile, 12 of 144 were not found. Knows no kernel.
Next: launch.py.
"""

from collections.abc import Callable
from typing import Any

from triton.runtime import jit

UpdateKey = Callable[[Any, Any], None]  # of a finder, by a function that is called


def ask_first(update: UpdateKey) -> UpdateKey:
    """`update`, for a function whose own key is known."""

    def update_known(finder: Any, function: Any) -> None:
        _ = function.cache_key  # found once
        update(finder, function)

    return update_known


def ask_always() -> None:
    """For every key that this process makes from now on. Nothing where Triton has other names for it: a key too many
    is a kernel compiled twice, and no reason not to start."""
    finder: Any = getattr(jit, "DependenciesFinder", None)
    if hasattr(finder, "_update_hash"):
        finder._update_hash = ask_first(finder._update_hash)
