"""Ranks of one host read the same files side by side, so that each byte comes from the disk once.

Eight ranks of DeepSeek-V3.2 read 690 GB of files, most bytes several times. What one of them has read stays in the
page cache for a while. So no rank may run ahead of the slowest one by more than a window that the cache holds: then
the others still find the bytes there. Positions are numbers in memory that the ranks share; nothing else is said.
Knows no files. Next: weights/loader.py, which asks before each span that it reads.
"""

import time

READ_AHEAD = 4 << 30  # bytes that a rank may be ahead of the slowest
PAUSE = 0.002  # seconds: 4 GiB take half a second and more
DONE = 1 << 62  # the position of a rank that reads no more


class Abreast:
    """Where each rank of a host is in the files, in bytes from the first one's beginning."""

    def __init__(self, positions: memoryview, rank: int, ahead: int = READ_AHEAD) -> None:
        """`positions`: i64, one for each rank of this host, zeros at first, in memory that all of them see. `rank`: of
        these ranks, which one this is."""
        self._positions, self._rank, self._ahead = positions.cast("B").cast("q"), rank, ahead

    def reach(self, position: int) -> None:
        """Say that this rank goes on at `position`, and wait until that is not too far ahead of the slowest."""
        own, rank = self._positions, self._rank
        own[rank] = max(own[rank], position)  # several threads read; the furthest counts
        while position > min(own.tolist()) + self._ahead:
            time.sleep(PAUSE)

    def __enter__(self) -> "Abreast":
        return self

    def __exit__(self, *_: object) -> None:
        """Nobody waits for this rank any more."""
        self._positions[self._rank] = DONE
