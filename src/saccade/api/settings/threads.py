"""How many threads compute on a CPU, and how they wait for each other.

Threads that share a product meet at its end, and by default those that wait spin. Beside other work the one that is
missing may not even run: each step then lasts as long as the scheduler's turn, and two threads were up to 100 times
slower than one. So there are as many as the matrices pay for, and waiting ones sleep. Knows no torch but the module
that is handed in. Next: resolve.py shows the choice.
"""

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from types import ModuleType

from saccade.base.limits import THREAD_LIMIT, count_cpus
from saccade.base.values import is_count, show
from saccade.errors import ConfigError
from saccade.plan.types import Plan

# Numbers of a matrix that a thread should have for itself: one token times so many takes a core 0.3 ms, F32 or BF16;
# to wake a thread that sleeps takes some hundredths of that, and its turn on a busy core far longer.
THREAD_SHARE = 1 << 20
COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # a user's own choice of the number
LOOKED_UP = "model.embed_tokens"  # a matrix that nothing is multiplied with
WAITS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # and of how to wait

_chosen: int | None = None  # what was last set here; torch's number is one for the process, so this is too


@contextmanager
def sleeping_threads() -> Iterator[None]:
    """Import torch in here, and its waiting threads sleep instead of spinning.

    OpenMP's libraries (libgomp in torch's builds, or libiomp) read the environment once, when they are loaded: where
    torch is imported already nothing changes. Nor does it where the user has set how to wait. Child processes inherit
    nothing.
    """
    if "torch" in sys.modules or any(name in os.environ for name in WAITS):
        yield
        return
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    try:
        yield
    finally:
        os.environ.pop("OMP_WAIT_POLICY", None)


def typical_matrix(plan: Plan) -> int:
    """Numbers of a matrix such that half of all numbers of the layers lie in matrices of that size at least."""
    shapes = [param.shape for param in plan.params if len(param.shape) >= 2 and param.name != LOOKED_UP]
    sizes = sorted((prod(shape[-2:]), prod(shape)) for shape in shapes)
    left = sum(size for _, size in sizes) / 2
    for matrix, size in sizes:
        left -= size
        if left <= 0:
            return matrix
    return 1


def choose_threads(asked: object, matrix: int, cpus: int, own: int | None = None) -> int:
    """`asked`, or for None `own`, the user's other choice, or as many as a `matrix` of so many numbers pays for, and at
    most `cpus`. Raises ConfigError for a senseless number."""
    if asked is None:
        return own or max(1, min(cpus, matrix // THREAD_SHARE))
    if not (is_count(asked, 1) and asked <= THREAD_LIMIT):  # type: ignore[operator]
        raise ConfigError(f"threads: expected an integer of at least 1 and at most {THREAD_LIMIT}, found {show(asked)}")
    return int(asked)  # type: ignore[call-overload]


def find_threads(found: int, asked: object, plan: Plan, device: str, ranks: int = 1) -> int:
    """With how many threads a model computes where torch has `found`: `choose_threads`' choice, the CPUs divided by the
    ranks of this machine; a GPU's host as many as it has."""
    own = found if device != "cpu" or is_own(found, os.environ) else None
    return choose_threads(asked, typical_matrix(plan), max(1, count_cpus() // ranks), own)


def is_own(found: int, environment: Mapping[str, str]) -> bool:
    """Whether the user has chosen the number: by OMP_NUM_THREADS or MKL_NUM_THREADS, or by torch.set_num_threads, which
    shows where torch has neither what it begins with nor what was last set here. It begins with one a CPU, or one a
    core where each has two hardware threads; a user who sets just that number cannot be told from one who does not."""
    if any(name in environment for name in COUNTS):
        return True
    if _chosen is not None:
        return found != _chosen
    cpus = {os.cpu_count() or 1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1}
    return found not in cpus | {n // 2 for n in cpus}


def set_threads(torch: ModuleType, threads: int) -> None:
    """Make torch compute with so many. The number is one for the process: other models and other code in it get it too,
    but for threads that have used torch before, which keep theirs."""
    global _chosen
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
        _chosen = threads
