"""Memory that the GPUs of one host share, for sums of small messages (kernels/collective/push.py).

Each rank allocates as much as the others and maps theirs, by CUDA's handles between processes. NVLink multicast is not
used: it is not needed, and a program that ends badly with it can put a host's GPUs out of service. torch's symmetric
memory would be shorter. But its processes meet under numbers that each counts for itself, so a process that has had
ranks before never meets one that begins. Knows no operations. Next: device.py.
"""

import weakref
from collections.abc import Callable
from contextlib import suppress

import torch

from saccade.errors import RankError
from saccade.kernels.collective.push import Peers, count_shared_words
from saccade.kernels.cudart import allocate_zeros, close_handle, free, make_handle, open_handle
from saccade.models.parameters import Layout

WORD_BYTES = 4
NOT_SHARED = "refused: "  # stands where a rank has no handle to tell


class SharedMemory:
    """This rank's, mapped by all others and with all others' mapped. It lives as long as this object does."""

    def __init__(self, collect: Callable[[str], list[str]], layout: Layout, device: torch.device, blocks: int) -> None:
        """All ranks of `layout` do this at the same time; `collect` tells a text to all and gives those of all, by
        rank. `blocks`: of the largest sum, see `count_blocks` in push.py. RankError, on all ranks, if memory cannot be
        shared."""
        self._held: list[tuple[Callable[[int], None], int]] = []  # addresses, and how each is given back
        weakref.finalize(self, release, device, self._held).atexit = False  # the end of a process gives all back
        with torch.cuda.device(device):
            handles = collect(self._offer(WORD_BYTES * count_shared_words(layout.tp, blocks)))
            require_all(handles)
            require_all(collect(self._open(handles, layout.rank)))
            own, *others = (address for _, address in self._held)
            self._told = torch.zeros(1, dtype=torch.int32).pin_memory()
            places = [*others[: layout.rank], own, *others[layout.rank :], self._told.data_ptr()]
            addresses = torch.tensor(places, device=device)
            counts, error = (torch.zeros(n, dtype=torch.int32, device=device) for n in (blocks, 1))
        self.peers = Peers(layout.rank, layout.tp, blocks, addresses, counts, error)

    def _offer(self, size: int) -> str:
        """The handle of this rank's memory, as text; or why there is none."""
        try:
            self._held.append((free, allocate_zeros(size)))
            return make_handle(self._held[0][1]).hex()
        except RuntimeError as error:
            return f"{NOT_SHARED}{error}"

    def _open(self, handles: list[str], rank: int) -> str:
        """Map the memory of all others; nothing, or why it cannot be."""
        try:
            for other, handle in enumerate(handles):
                if other != rank:
                    self._held.append((close_handle, open_handle(bytes.fromhex(handle))))
        except RuntimeError as error:
            return f"{NOT_SHARED}{error}"
        return ""

    def find_missing(self) -> int | None:
        """The rank that a sum waited for in vain; None while all come. Waits for nothing: read it behind the tokens."""
        return int(self._told) - 1 if int(self._told) else None


def require_all(texts: list[str]) -> None:
    """RankError if a rank is refused."""
    for rank, text in enumerate(texts):
        if text.startswith(NOT_SHARED):
            raise RankError(
                f"rank {rank}: the GPUs of this machine cannot share memory: {text.removeprefix(NOT_SHARED)}; free"
                " some if it is out of memory, otherwise start all ranks in one container"
            )


def release(device: torch.device, held: list[tuple[Callable[[int], None], int]]) -> None:
    """What a rank mapped, then what it allocated. An error means that the device is gone."""
    with suppress(RuntimeError), torch.cuda.device(device):
        while held:
            give_back, address = held.pop()
            give_back(address)
