"""Out of memory, on the system or on a GPU, as an error in words: what did not fit, and what makes it smaller.

api/settings/resolve.py estimates memory first. This is for the cases in which the machine then gives less. Knows no
torch: its exceptions are recognised by class names and texts. Next: errors.py.
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from saccade.errors import MemoryRefusedError

MARKS = (
    "can't allocate memory", "cannot allocate memory", "out of memory", "not enough memory", "bad_alloc",
    "can't start new thread",
)  # fmt: skip


def is_refusal(error: BaseException) -> bool:
    """Whether an exception says that memory was refused: Python's own, torch's on a CPU or a GPU, the system's."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    if type(error).__name__ == "OutOfMemoryError":  # torch.OutOfMemoryError, a RuntimeError
        return True
    return isinstance(error, RuntimeError) and any(mark in str(error).lower() for mark in MARKS)


@contextmanager
def naming_memory(what: str, cure: str) -> Iterator[None]:
    """Any refusal of memory inside becomes MemoryRefusedError: `what` did not fit, `cure` makes it smaller."""
    try:
        yield
    except (MemoryError, OSError, RuntimeError) as error:
        if not is_refusal(error):
            raise
        raise MemoryRefusedError(f"no memory for {what} ({find_said(error)}); {cure}") from error


def find_said(error: BaseException) -> str:
    """The sentence in which an allocator says how much was asked for; torch puts a place of its sources before it."""
    sentences = " ".join(str(error).split()).split(". ")
    said = next((s for s in sentences if any(mark in s.lower() for mark in MARKS)), sentences[0])
    return said.removeprefix("DefaultCPUAllocator: ")[:160] or "refused"
