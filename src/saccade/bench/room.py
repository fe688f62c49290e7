"""What fits in memory. A batch or context that does not is left out of a measurement, with one line that says why.

Estimates come first, so that most cases end before anything is allocated; an allocator that refuses later ends the
same way. Next: rig.py.
"""

import traceback
from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager

import torch

from saccade.base.limits import find_free_memory
from saccade.base.memory import find_said, is_refusal
from saccade.errors import MemoryRefusedError, RequestError
from saccade.parallel.ranks import ONE_RANK, Ranks

CACHE_ROOM = 0.95  # of free memory that a cache may take; a step needs some beside it


def count_free(device: torch.device) -> int:
    """Bytes that can still be allocated."""
    if device.type != "cuda":
        return find_free_memory()
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def require_room(nbytes: float, device: torch.device, ranks: Ranks = ONE_RANK) -> None:
    """MemoryRefusedError, on all ranks, if a cache of so many bytes does not fit on one of them."""
    free = count_free(device)
    if "no" in ranks.collect("yes" if nbytes <= CACHE_ROOM * free else "no"):
        raise MemoryRefusedError(f"its cache needs {nbytes / 1e9:.1f} GB; {free / 1e9:.1f} GB are free")


def find_refusal(error: BaseException | None) -> BaseException | None:
    """What refused memory: the exception, or one behind it, as where a graph's capture that it ended complains, too."""
    while error is not None and not isinstance(error, MemoryRefusedError) and not is_refusal(error):
        error = error.__cause__ or error.__context__
    return error


@contextmanager
def left_out(case: str, device: torch.device, say: Callable[[str], None], ranks: Ranks = ONE_RANK) -> Iterator[None]:
    """A case that does not fit in memory ends there and is said; what follows goes on. RequestError on many ranks,
    where the others wait for this one's part of a sum."""
    try:
        yield
    except (MemoryRefusedError, MemoryError, RuntimeError) as error:
        refusal = find_refusal(error)
        if refusal is None:
            raise
        told = isinstance(refusal, MemoryRefusedError)
        why = str(refusal) if told else f"it does not fit in memory ({find_said(refusal)})"
        traceback.clear_frames(error.__traceback__)  # their tensors are in the way of what follows
        if ranks.layout.tp > 1 and not told:
            raise RequestError(f"{case}: {why}") from None
        say(f"left out: {case}: {why}")
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what graphs held in pools of their own


def require_measured(records: Sized) -> None:
    """RequestError if everything was left out."""
    if not records:
        raise RequestError("nothing was measured: nothing that was asked for fits in memory; try fewer --layers")
