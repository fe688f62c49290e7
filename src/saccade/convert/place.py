"""The directory that a conversion writes to, held by one writer: lock, files that become whole, no trace of a refusal.

A file has another name while it is written, `.NAME.part`, and gets its own when it is whole and on the disk. It is
always a new file: what stands under a name may be a link to the source's own bytes. What a file system lacks is noted
and worked without where that is safe. Knows no checkpoint. Next: target.py, which says what may have been left there.
"""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from saccade.base import disk
from saccade.errors import ConvertError, LoadError

LOCK = ".saccade-convert.lock"  # held by the one writer, gone when it ends
PART_NAME = ".{}.part"  # the name that a file has while it is written
LONGEST_NAME = 200  # bytes of a name; PART makes it longer, and file systems take 255
COPY_CHUNK = 1 << 20  # bytes copied at once
LOCK_TRIES = 50  # to find the lock's file under its name: where files have no lasting numbers, it never is
BUSY_TEXT = "another conversion is writing to it; wait for that to end"
LOCK_FLAGS = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC  # NFS locks only what may be written to
FRESH = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
UNLOCKED = "its file system has no locks: see that nobody else writes there meanwhile"
UNSYNCED = "its file system cannot bring files to the disk: if the machine stops soon, they may be lost"


class Place:
    """A directory, what was made of it, and what its file system lacks."""

    def __init__(self, out: Path):
        self.out = out
        self.notes: dict[str, None] = {}  # in order
        self.is_hopeless = False  # a call failed that will fail again
        self.finished = 0  # files that got their names in this run
        self.linked: list[str] = []  # in this run
        self._made: list[Path] = []  # directories, the deepest last
        self._lock = -1
        self._token = b""  # where there are no locks: whoever comes later leaves its own

    def hold(self) -> None:
        """Make the directory, if it is not there, and its lock. BlockingIOError if somebody else has it."""
        for tries in range(LOCK_TRIES + 1):
            try:
                self._make(self.out)
                descriptor = os.open(self.out / LOCK, LOCK_FLAGS, 0o666)
            except FileNotFoundError:
                if tries == LOCK_TRIES:
                    raise
                continue  # another one made it and left again
            try:
                has_locks = disk.lock_file(descriptor)
                with suppress(FileNotFoundError):  # its holder removed it meanwhile: the next one is another file
                    is_ours = os.path.samestat(os.fstat(descriptor), os.stat(self.out / LOCK))
                    if is_ours or not has_locks or tries == LOCK_TRIES:
                        if not has_locks or not is_ours:
                            self._token = os.urandom(16).hex().encode()
                            os.ftruncate(descriptor, 0)
                            write_at(descriptor, self._token, 0)
                            self.notes[UNLOCKED] = None
                        self._lock = descriptor
                        return
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)

    def _make(self, folder: Path) -> None:
        if not folder.is_dir():
            if folder != folder.parent:
                self._make(folder.parent)
            with suppress(FileExistsError):
                os.mkdir(folder)
                self._made.append(folder)

    def release(self) -> None:
        """Let go of the lock, and of the directories that were made and are empty."""
        if self._lock >= 0:
            with suppress(OSError):
                if self._is_ours():
                    os.unlink(self.out / LOCK)  # while it is held: whoever waits for it sees that it is gone
            os.close(self._lock)
            self._lock = -1
        for folder in reversed(self._made):
            with suppress(OSError):
                os.rmdir(folder)

    def _is_ours(self) -> bool:
        return not self._token or (self.out / LOCK).read_bytes() == self._token

    def create(self, name: str) -> int:
        """The descriptor of a new file that will be called so."""
        part = part_of(self.out / name)
        self._make(part.parent)
        with suppress(FileNotFoundError):
            os.unlink(part)
        return os.open(part, FRESH, 0o666)

    def finish(self, name: str, descriptor: int) -> None:
        """Bring a file to the disk, then give it its name: in this order, a name is a promise."""
        try:
            if not disk.sync_file(descriptor):
                self.notes[UNSYNCED] = None
        finally:
            os.close(descriptor)
        self.require_ours()
        os.replace(part_of(self.out / name), self.out / name)
        disk.sync_folder((self.out / name).parent)
        self.finished += 1

    def require_ours(self) -> None:
        try:
            is_ours = self._is_ours()
        except FileNotFoundError:
            is_ours = False
        if not is_ours:
            raise ConvertError.at(self.out, BUSY_TEXT)

    def write(self, name: str, content: bytes) -> None:
        """A small file, whole or not at all."""
        descriptor = self.create(name)
        try:
            write_at(descriptor, content, 0)
        except BaseException:
            os.close(descriptor)
            raise
        self.finish(name, descriptor)

    def copy(self, source: Path, name: str) -> None:
        """A file, byte for byte. LoadError if it cannot be read."""
        done = 0
        descriptor = self.create(name)
        try:
            for content in read_chunks(source):
                done += write_at(descriptor, content, done)
        except BaseException:
            os.close(descriptor)
            raise
        self.finish(name, descriptor)

    def link(self, how: str, source: str, name: str) -> str | None:
        """A link to a file that is whole; None, or the reason why it cannot be one."""
        self.require_ours()
        path = self.out / name
        with suppress(FileNotFoundError):
            os.unlink(path)
        reason = disk.make_link(how, source, path)
        if reason is None:
            disk.sync_folder(path.parent)
            self.linked.append(name)
        return reason

    def would_link(self, how: str, source: str) -> str | None:
        """As `link`, but nothing stays."""
        path = self.out / PART_NAME.format(LOCK)
        with suppress(FileNotFoundError):
            os.unlink(path)
        reason = disk.make_link(how, source, path)
        with suppress(FileNotFoundError):
            os.unlink(path)
        return reason

    def is_case_blind(self) -> bool:
        """Whether names that differ in upper and lower case are one here; the lock's file tells."""
        return (self.out / LOCK.upper()).exists()

    def remove(self, names: list[str]) -> None:
        for name in names:
            with suppress(OSError):
                os.unlink(self.out / name)


@contextmanager
def held(out: Path) -> Iterator[Place]:
    """Hold a directory for one writer while the body runs. ConvertError, and nothing left, if that cannot be."""
    place = Place(out)
    try:
        place.hold()
    except BlockingIOError:
        place.release()
        raise ConvertError.at(out, BUSY_TEXT) from None
    except OSError as e:
        place.release()
        raise ConvertError.at(out, f"cannot be written to: {e.strerror}") from None
    try:
        yield place
    finally:
        place.release()


def part_of(path: Path) -> Path:
    """The name that a file has while it is written."""
    name = path.name
    if len(os.fsencode(name)) > LONGEST_NAME:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()[:32]
    return path.with_name(PART_NAME.format(name))


def remove_parts(out: Path) -> None:
    """Files that never became whole."""
    for part in out.rglob(PART_NAME.format("*")):
        part.unlink()


def read_chunks(path: Path) -> Iterator[bytes]:
    """A file, piece by piece. LoadError if it cannot be read."""
    try:
        with open(path, "rb", buffering=0) as file:
            while content := file.read(COPY_CHUNK):
                yield content
    except OSError as e:
        raise LoadError.at(path, f"cannot be read: {e.strerror}") from None


def write_at(descriptor: int, content: bytes | memoryview, place: int) -> int:
    """Write all of it there; the number of bytes."""
    view = memoryview(content)
    done = 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done:], place + done)
    return done
