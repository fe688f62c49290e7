"""The folder of processes that compile, for the assembler's files. It goes with its owner, or at a later start.

An owner that is killed removes nothing. So each holds the lock of a file in its folder, which ends with it, and
whoever makes a folder removes those of the same user whose lock nobody holds. Next: beside.py.
"""

import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from saccade.base import disk

PREFIX, LOCK_NAME = "saccade-compiling-", "held"
FLAGS = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC  # NFS locks only what may be written to
FOLDER_TRIES = 20  # to take the lock before another start has taken the folder for one that is left


class OwnFolder:
    """A folder of this process, until `remove`. No finalizer removes it: that would happen when a fork ends, too."""

    def __init__(self) -> None:
        """OSError if none can be made. Where files have no locks, none that is left is removed."""
        remove_left()
        for _ in range(FOLDER_TRIES):
            self.path = tempfile.mkdtemp(prefix=PREFIX)
            with suppress(FileNotFoundError, BlockingIOError):
                self._lock = hold(self.path, os.O_CREAT)[0]
                if os.path.exists(self.path):
                    return
                os.close(self._lock)
        raise FileNotFoundError(f"{self.path}: removed by others while it was made")

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def hold(folder: str | Path, flags: int = 0) -> tuple[int, bool]:
    """The open lock of a folder, and whether there are locks. BlockingIOError if another process has it."""
    lock = os.open(os.path.join(folder, LOCK_NAME), FLAGS | flags, 0o600)
    try:
        return lock, disk.lock_file(lock)
    except OSError:
        os.close(lock)
        raise


def remove_left() -> None:
    """Remove the folders whose owners are gone."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with suppress(OSError):
            if folder.lstat().st_uid == os.getuid():
                lock, is_held = hold(folder)
                if is_held:
                    shutil.rmtree(folder, ignore_errors=True)
                os.close(lock)
