"""Where bytes of files land, and how they get to a device: by pinned buffers, refilled only after their copy has ended.

A GPU copies out of pinned memory while the reader goes on, so a buffer must not be written again before the event
behind its copy. With two of them the next bytes are read while the last ones travel. Bytes are copied as they are: what
becomes of them happens where they arrive. Knows no files and no names. Next: read.py.
"""

import mmap
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from saccade.errors import LoadError

BUFFERS = 2  # of each thread: one is read into, one is copied from


class Memory(Protocol):
    """What one thread reads into, and how others get it."""

    def claim(self) -> memoryview:
        """Room for `size` bytes, which may be overwritten."""

    def deliver(self, size: int) -> Tensor:
        """u8 [size], the first bytes of the room, to be used before the next `claim`."""

    def close(self) -> None:
        """Wait until nobody reads the room any more."""


class Buffer:
    """On the host: what was read is used where it stands."""

    def __init__(self, size: int):
        # Anonymous memory, which begins on a page: nothing is zeroed or touched before it is read into.
        try:
            self._memory = mmap.mmap(-1, max(size, 1))
        except OSError as e:
            raise LoadError(f"{size:,} bytes to read into: {e.strerror}; free memory or use fewer threads") from None
        self._bytes = torch.frombuffer(self._memory, dtype=torch.uint8)

    def claim(self) -> memoryview:
        return memoryview(self._memory)

    def deliver(self, size: int) -> Tensor:
        return self._bytes[:size]

    def close(self) -> None:
        pass


class Event(Protocol):
    def synchronize(self) -> None:
        """Wait for everything that was sent before the event."""


class Card(Protocol):
    """What staging needs of a device. `send` may return before the bytes have gone."""

    def pin(self, size: int) -> Tensor: ...
    def send(self, held: Tensor) -> Tensor: ...
    def record(self) -> Event: ...


class Cuda:
    """A CUDA device, as seen from the current stream of the calling thread."""

    def __init__(self, device: torch.device):
        self._device = device

    def pin(self, size: int) -> Tensor:
        try:
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)
        except RuntimeError:  # a limit of locked memory: copies then wait for themselves, the bytes are the same
            return torch.empty(size, dtype=torch.uint8)

    def send(self, held: Tensor) -> Tensor:
        return torch.empty(held.shape, dtype=held.dtype, device=self._device).copy_(held, non_blocking=True)

    def record(self) -> Event:
        event = torch.cuda.Event(blocking=True)  # a waiting thread leaves its core to those that read
        event.record(torch.cuda.current_stream(self._device))
        return event


class Staging:
    """On the way to a device: BUFFERS pinned buffers in turn. Delivered bytes are the device's own, and are there for
    whatever its stream does next."""

    def __init__(self, size: int, card: Card):
        self._card = card
        self._pinned = [card.pin(max(size, 1)) for _ in range(BUFFERS)]
        self._sent: list[Event | None] = [None] * BUFFERS
        self._turn = 0

    def claim(self) -> memoryview:
        if (sent := self._sent[self._turn]) is not None:
            sent.synchronize()
        return self._pinned[self._turn].numpy().data

    def deliver(self, size: int) -> Tensor:
        arrived = self._card.send(self._pinned[self._turn][:size])
        self._sent[self._turn] = self._card.record()
        self._turn = (self._turn + 1) % BUFFERS
        return arrived

    def close(self) -> None:
        for sent in self._sent:
            if sent is not None:
                sent.synchronize()


def memory_for(device: torch.device) -> Callable[[int], Memory]:
    """How memory of a given size is made for bytes that are to be used on `device`."""
    return (lambda size: Staging(size, Cuda(device))) if device.type == "cuda" else Buffer
