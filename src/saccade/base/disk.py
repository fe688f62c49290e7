"""File systems that lack something, and what each lack means.

Network, FUSE and old file systems may lack locks, syncs of directories, read-ahead advice or hard links. Each function
here asks for one of these and returns whether it was there. An error that means lost data (EIO, a full disk) is raised.
Knows no checkpoint and no directory of its own. Next: convert/place.py, checkpoint/read.py.
"""

import errno
import fcntl
import os
import shutil
import unicodedata
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

# "This file system has no such call": Linux gives ENOSYS or EOPNOTSUPP, CIFS and many FUSE systems EINVAL.
LACKING = frozenset({errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOTTY})
# Lustre without "flock" gives ENOSYS, NFS without its lock daemon ENOLCK, some FUSE systems EPERM.
LOCKLESS = LACKING | {errno.ENOLCK, errno.EPERM}
LOCK_TAKEN = frozenset(
    {errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES}
)  # CIFS says EACCES for a lock that another one holds
# Of a directory's fsync: EBADF where it asks for a descriptor that may be written to, EACCES and EPERM where a
# directory cannot be opened for reading, EISDIR on systems that open no directory.
FOLDER_LACKING = LACKING | {errno.EBADF, errno.EACCES, errno.EPERM, errno.EISDIR}
# Of link(2) and symlink(2): another file system; no links on this one, or not to somebody else's file
# (fs.protected_hardlinks); as many links as a file may have.
LINKLESS = LACKING | {errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK}
# Nothing that a second try would mend: the file system cannot do what writing a checkpoint needs.
HOPELESS = LACKING | {errno.EPERM, errno.ESPIPE, errno.EROFS, errno.EXDEV, errno.ENAMETOOLONG}


def advise_sequential(descriptor: int) -> None:
    """Ask for more read-ahead; without it everything is the same, only slower. Absent on macOS."""
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)


def sync_file(descriptor: int) -> bool:
    """Bring a file to the disk. False if its file system has no such call; OSError if bytes may be lost."""
    try:
        os.fsync(descriptor)
    except OSError as e:
        if e.errno in LACKING:
            return False
        raise
    return True


def sync_folder(folder: Path) -> bool:
    """Bring a directory's names to the disk. False if its file system has no such call."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as e:
        if e.errno in FOLDER_LACKING:
            return False
        raise
    return True


def lock_file(descriptor: int) -> bool:
    """Take the lock of an open file. False if there are no locks here; BlockingIOError if another one holds it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        if e.errno in LOCK_TAKEN:
            raise BlockingIOError(e.errno, e.strerror) from None
        if e.errno in LOCKLESS:
            return False
        raise
    return True


def make_link(how: str, source: str, path: Path) -> str | None:
    """Make `path` a "hard" link to a file, or a "sym" link to its absolute path. None, or the reason why it cannot
    be one. Other errors are raised."""
    try:
        (os.link if how == "hard" else os.symlink)(source, path)
    except OSError as e:
        if e.errno in LINKLESS:
            return e.strerror or errno.errorcode.get(e.errno or 0, "refused")
        raise
    return None


def is_same(a: os.stat_result, b: os.stat_result) -> bool:
    """Whether two names are of one file or directory. Some network file systems number nothing: then they are not."""
    return a.st_ino != 0 and os.path.samestat(a, b)


def find_existing(path: Path) -> Path:
    """The path itself or the nearest directory above it that is there."""
    place = path.resolve()
    while not place.exists() and place != place.parent:
        place = place.parent
    return place


def find_too_long(folder: Path, names: Iterable[str]) -> tuple[str, int] | None:
    """A path below `folder`, one of whose names its file system is too short for, and its limit in bytes."""
    try:
        limit = os.pathconf(folder, "PC_NAME_MAX")
    except (OSError, ValueError, AttributeError):
        return None
    for name in names:
        if 0 < limit < max(len(os.fsencode(part)) for part in Path(name).parts):
            return name, limit
    return None


def find_clash(names: Iterable[str]) -> tuple[str, str] | None:
    """Two paths that are one where upper and lower case, or ways to compose a letter, are the same."""
    seen: dict[str, str] = {}
    for name in names:
        key = unicodedata.normalize("NFD", name).casefold()
        if seen.setdefault(key, name) != name:
            return seen[key], name
    return None


def find_free(folder: Path) -> int | None:
    """Bytes that are free where a directory is or will be; None if its file system does not say."""
    try:
        usage = shutil.disk_usage(find_existing(folder))
    except OSError as e:
        if e.errno in LACKING:
            return None
        raise
    return usage.free if usage.total else None  # some FUSE systems say 0 of 0
