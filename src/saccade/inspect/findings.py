"""What was found in the bytes of a checkpoint, as data.

Imports no torch: `check` without --contents stays a matter of headers. Who finds: contents.py. Who prints: show.py.
"""

from dataclasses import dataclass
from typing import NamedTuple

from saccade.errors import Problem

UPCAST_BOUND = 2.0**-8  # the most that BF16's 8 significant bits can round a number by, relative
OUTLIER = 12  # a scale farther than 2^12 from its tensor's median is named: e4m3 itself spans 2^18


class Upcast(NamedTuple):
    """What becomes of one `wk` when it is held in BF16."""

    tensor: str
    stored: str
    least_scale: float | None  # None: plain numbers
    largest_scale: float | None
    column_blocks: int
    scales: int  # how many of them differ
    is_power_of_two: bool  # then the upcast is exact, bit for bit
    rounding: float  # measured, relative to the exact product


@dataclass(frozen=True)
class Contents:
    """The outcome of reading every byte."""

    problems: tuple[Problem, ...]
    notes: tuple[Problem, ...]  # worth a look, but nothing is lost
    upcasts: tuple[Upcast, ...]
    was_scanned: bool  # False: only digests were asked for, or the files are not sound
    digests: int | None  # files whose SHA-256 is as given; None if none were given
    read_bytes: int
    seconds: float
    threads: int
    memory_bytes: int  # bound on buffers and temporaries, beyond the table of tensors
