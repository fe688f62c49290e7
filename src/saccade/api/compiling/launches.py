"""Launches that are noted instead of made: which kernels a step needs, and how each is compiled into Triton's cache.

For a process that does nothing else. It needs no GPU: Triton's own code binds the arguments, so a kernel is what a
launch of these arguments would look up, and meta tensors are enough. A kernel's identity is what Triton makes of its
arguments: their dtypes, which integers are 1 or multiples of 16, which pointers are aligned, and constants.
Next: meta_model.py, the steps.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

WARP = 32  # threads

_compile: Callable[..., Any] = JITFunction._do_compile


class NewKernel(NamedTuple):
    """A kernel that a launch needs and none before it did."""

    function: Any  # JITFunction
    told: tuple[Any, ...]  # what Triton's compiler is told of it: key, signature, constants, options, attributes

    @property
    def name(self) -> str:
        return str(self.function.fn.__name__)

    @property
    def key(self) -> str:
        """What Triton looks it up by: the types, values and alignments of arguments, then options."""
        return str(self.told[0])

    def compile(self) -> Any:
        """Triton's compiled kernel, which lies in its cache now."""
        return _compile(self.function, *self.told)


def note_launches(capability: int) -> list[NewKernel]:
    """From now on no launch of this process is made, and none compiles. Each new kernel is added to the list that is
    returned, in the order of first launches. `capability`: ten times the GPU's."""
    found: list[NewKernel] = []
    known: set[tuple[int, Any]] = set()
    run = JITFunction.run

    def note(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        run(self, *args, grid=grid, warmup=True, **options)

    def note_new(self: Any, key: Any, *told: Any) -> None:
        if (id(self), key) not in known:
            known.add((id(self), key))
            found.append(NewKernel(self, (key, *told)))

    JITFunction.run = note
    JITFunction._do_compile = note_new
    triton.runtime.driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", capability, WARP),
            get_current_device=lambda: 0,
            get_current_stream=lambda _: 0,
        )
    )
    return found
