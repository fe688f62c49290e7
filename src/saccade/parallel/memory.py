"""Memory that processes of one machine share, without a name: it is gone with the last of them, however that ends.

A process makes it and tells its own number and the memory's; others of the same user open it through /proc. Nothing
lies in /dev/shm, so nothing is left there, and a full /dev/shm is no obstacle. Next: abreast.py.
"""

import mmap
import os
from collections.abc import Sequence

SIZE = 1 << 16  # bytes: a position of 8 bytes for each rank of a machine


def make_memory(size: int = SIZE) -> int:
    """The file descriptor of zeros. They are there until it is closed and nobody maps them."""
    fd = os.memfd_create("saccade")
    os.ftruncate(fd, size)
    return fd


def open_memory(place: Sequence[int]) -> mmap.mmap | None:
    """The memory that process `place[0]` made as its descriptor `place[1]`; None if it cannot be had."""
    pid, fd = place
    try:
        opened = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return mmap.mmap(opened, os.fstat(opened).st_size)
    except (OSError, ValueError):
        return None
    finally:
        os.close(opened)
