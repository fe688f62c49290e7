"""File systems that lack something, and folders with things that are no files: worked on with a note, or one line."""

import errno
import json
import os
import shutil
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from killed_conversions import digest, is_refused
from refused_conversions import failing, refuse
from torch import Tensor

from saccade.base import disk
from saccade.checkpoint.index import INDEX_FILE
from saccade.checkpoint.open import JOURNAL
from saccade.convert import place, stream
from saccade.convert.changes import Mode
from saccade.convert.convert import convert
from saccade.convert.place import UNLOCKED, UNSYNCED
from saccade.errors import ConvertError

BF16, UPCAST = Mode("bf16"), Mode("upcast", ("indexer.wk",))


def refusing(code: int) -> Callable[..., Any]:
    def refuse_all(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    return refuse_all


@pytest.mark.parametrize(
    ("lock", "folder", "file", "advice", "space"),
    [
        (errno.ENOSYS, errno.EINVAL, errno.ENOSYS, errno.ENOSYS, errno.ENOSYS),  # Lustre without flock; FUSE
        (errno.ENOLCK, errno.EBADF, None, errno.ESPIPE, None),  # NFS without its lock daemon
        (errno.EPERM, errno.EACCES, errno.EINVAL, None, 0),  # None: this call is not there, or it works
        ("numbers", errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, 0),  # a file has another number at each look
    ],
)
def test_what_a_file_system_lacks_is_worked_without(
    lock: Any, folder: int, file: int | None, advice: int | None, space: int | None,
    fp8_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bf16_digest: dict[str, str],
) -> None:  # fmt: skip
    real, usage, synced = os.fsync, shutil.disk_usage(tmp_path), []

    def fsync(descriptor: int) -> None:
        code = folder if stat.S_ISDIR(os.fstat(descriptor).st_mode) else file
        synced.append(code)
        if code is not None:
            raise OSError(code, os.strerror(code))
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        if lock == "numbers":
            patch.setattr(os.path, "samestat", lambda *_: False)
        else:
            patch.setattr(disk.fcntl, "flock", refusing(lock))
        if advice is None:
            patch.delattr(os, "posix_fadvise")
        else:
            patch.setattr(os, "posix_fadvise", refusing(advice))
        if space is not None:
            none = usage._replace(total=0, free=0)
            patch.setattr(shutil, "disk_usage", refusing(space) if space else lambda _: none)
        report = convert(fp8_model, tmp_path / "out", BF16, threads=2)
    assert folder in synced and digest(tmp_path / "out") == bf16_digest
    assert report.notes == (UNLOCKED, UNSYNCED)[: 1 if file is None else 2]


def shards_only(call: Callable[..., Any], code: int) -> Callable[..., Any]:
    """`pwrite` that fails where a shard is written, whose first bytes are a header's length."""
    return lambda fd, content, at: refusing(code)() if len(content) > 5000 else call(fd, content, at)


@pytest.mark.parametrize(
    ("name", "make", "words"),
    [
        ("replace", lambda call: refusing(errno.EPERM), "cannot be written to: Operation not permitted"),
        ("open", lambda call: lambda path, flags, *a: refusing(errno.EROFS)() if "lock" in str(path) else call(path, flags, *a), "cannot be written to: Read-only file"),
        ("fsync", lambda call: failing(call, 1, errno.EDQUOT), "cannot be written to: Disk quota exceeded"),
        ("fsync", lambda call: failing(call, 2, errno.EIO), "cannot be written to: Input/output error"),
        ("pwrite", lambda call: shards_only(call, errno.ESPIPE), "Illegal seek; its file system cannot do what this needs; convert to a local disk"),
        ("pwrite", lambda call: shards_only(call, errno.EINVAL), "Invalid argument; its file system cannot do what this needs"),
    ],
    ids=["no rename", "read-only", "quota", "broken", "in order only", "no pwrite"],
)  # fmt: skip
def test_a_refusal_leaves_nothing_behind(
    name: str, make: Any, words: str, fp8_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, name, make(getattr(os, name)))
    with pytest.raises(ConvertError, match=words) as error:
        convert(fp8_model, tmp_path / "deep" / "out", UPCAST, threads=2)
    assert "\n" not in str(error.value) and not (tmp_path / "deep").exists()


@pytest.mark.parametrize(("call", "code"), [("pwrite", errno.EDQUOT), ("fsync", errno.EIO)])
def test_what_may_be_mended_leaves_a_beginning(
    call: str, code: int, fp8_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bf16_digest: dict[str, str]
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing(getattr(os, call), 5, code))
        with pytest.raises(ConvertError, match=f"{os.strerror(code)}; what is finished stays"):
            convert(fp8_model, out, BF16, threads=2)
    assert (out / JOURNAL).exists() and is_refused(out)
    convert(fp8_model, out, BF16)
    assert digest(out) == bf16_digest


def test_a_lock_that_is_taken_is_told_as_network_file_systems_tell_it(
    fp8_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk.fcntl, "flock", refusing(errno.EACCES))
    with pytest.raises(ConvertError, match="another conversion is writing to it"):
        convert(fp8_model, tmp_path / "out", BF16)


def test_without_locks_the_later_of_two_goes_on(
    fp8_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bf16_digest: dict[str, str]
) -> None:
    """The earlier gives no file its name any more, and takes nothing of the later with it."""
    out, fill = tmp_path / "out", stream.fill_output
    monkeypatch.setattr(disk.fcntl, "flock", refusing(errno.ENOSYS))

    def overtaken(index: Any, output: Any, *args: Any) -> None:
        if output.name.startswith("model-00002"):
            monkeypatch.setattr(stream, "fill_output", fill)
            convert(fp8_model, out, BF16)
        fill(index, output, *args)

    monkeypatch.setattr(stream, "fill_output", overtaken)
    with pytest.raises(ConvertError, match="another conversion"):
        convert(fp8_model, out, BF16)
    assert digest(out) == bf16_digest


def test_names_that_the_target_cannot_hold_are_told_beforehand(
    fp8_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, long = tmp_path / "out", "n" * 251 + ".txt"
    (fp8_model / long).write_text("long")
    (fp8_model / "Notes.txt").write_text("a")
    convert(fp8_model, out, UPCAST)  # longer yet while it is written
    assert (out / long).read_text() == "long"
    shutil.rmtree(out)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pathconf", lambda *_: 143)  # eCryptfs
        with pytest.raises(ConvertError, match=f"{long}: its file system takes names of 143 bytes at most"):
            convert(fp8_model, out, UPCAST)
    assert not out.exists()
    (fp8_model / "notes.TXT").write_text("b")
    monkeypatch.setattr(place.Place, "is_case_blind", lambda _: True)
    with pytest.raises(ConvertError, match="Notes.txt and notes.TXT are one name on its file system"):
        convert(fp8_model, out, UPCAST)
    assert not out.exists()


def test_one_directory_under_two_names_is_one(fp8_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a bind mount or another case of letters makes it: the paths differ, the numbers do not."""
    (tmp_path / "M").mkdir()
    one = os.stat(fp8_model)
    monkeypatch.setattr(disk, "is_same", lambda a, b: a.st_ino == b.st_ino)
    real = Path.stat
    monkeypatch.setattr(Path, "stat", lambda self, **k: one if self == tmp_path / "M" else real(self, **k))
    for out, words in (
        (tmp_path / "M", "is the model itself"),
        (tmp_path / "M" / "deep", "is inside the model itself"),
    ):
        with pytest.raises(ConvertError, match=words):
            convert(fp8_model, out, BF16)


@pytest.fixture
def sockets(tmp_path: Path) -> Iterator[Callable[[Path], None]]:
    held = []

    def make(path: Path) -> None:
        held.append(socket.socket(socket.AF_UNIX))
        here = os.getcwd()
        os.chdir(path.parent)  # a socket's path has 108 bytes at most
        try:
            held[-1].bind(path.name)
        finally:
            os.chdir(here)

    yield make
    for s in held:
        s.close()


def test_what_cannot_be_copied_is_refused_by_name_before_anything_is_written(
    fp8_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sockets: Callable[[Path], None]
) -> None:
    deep, out = fp8_model / "code", tmp_path / "out"
    deep.mkdir()
    (fp8_model / "other").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (deep / "locked.py").write_text("")
    real = os.open
    odd: dict[str, tuple[Callable[[Path], object], str]] = {
        "code/pipe": (os.mkfifo, "is a pipe, which has no content"),
        "code/socket": (sockets, "is a socket, which has no content"),
        "tokenizer.model": (lambda p: p.symlink_to("gone"), "is a link to gone, which is not there"),
        "merges.txt": (lambda p: p.symlink_to("config.json/x"), "is a link to config.json/x, which is not there"),
        "round": (lambda p: p.symlink_to("round"), "is a link that leads back to itself"),
        "code/up": (lambda p: p.symlink_to(".."), "is a link to a folder that holds the model itself"),
        "code/here": (lambda p: p.symlink_to("."), "is a link to a folder that it lies in"),
        "parent": (lambda p: p.symlink_to(tmp_path), "is a link to a folder that holds the model itself"),
        "code/null": (lambda p: p.symlink_to("/dev/null"), "is a device, which has no content"),
        "\x1b[2Jname": (os.mkfifo, "is a pipe"),
    }  # fmt: skip
    for name, (make, words) in odd.items():
        make(fp8_model / name)
        with pytest.raises(ConvertError) as error:
            convert(fp8_model, out, BF16)
        text = str(error.value)
        shown = name if name.isprintable() else ascii(name)
        assert f"{shown} {words}" in text and "\n" not in text and "\x1b" not in text, text
        assert not out.exists()
        os.unlink(fp8_model / name)
    (deep / "across").symlink_to("../other")  # two folders that hold each other
    (fp8_model / "other" / "back").symlink_to("../code")
    refuse("across/back is a link to a folder that it lies in", fp8_model, out)
    (deep / "across").unlink()
    (fp8_model / "other" / "back").unlink()
    (fp8_model / "results").symlink_to(tmp_path / "elsewhere")
    refuse("results is a link to a folder that holds the result", fp8_model, tmp_path / "elsewhere" / "out")
    (fp8_model / "results").unlink()
    monkeypatch.setattr(
        os, "open", lambda p, *a, **k: refusing(errno.EACCES)() if str(p).endswith("locked.py") else real(p, *a, **k)
    )
    for k in range(5):
        os.mkfifo(deep / f"z{k}")
    words = "code/locked.py cannot be read: Permission denied; code/z0 is a pipe.*; and 3 more; nothing was written"
    refuse(words, fp8_model, out)


def test_links_and_linked_folders_are_copied_as_what_they_lead_to(fp8_model: Path, tmp_path: Path) -> None:
    blobs = tmp_path / "blobs"
    (blobs / "pack" / "deep").mkdir(parents=True)
    (blobs / "pack" / "deep" / "a.py").write_text("a")
    (blobs / "one").write_text("one")
    (fp8_model / "tokenizer.json").symlink_to("../blobs/one")  # as the Hub's cache has it
    (fp8_model / "absolute.txt").symlink_to(blobs / "one")
    (fp8_model / "pack").symlink_to(blobs / "pack")
    (fp8_model / "again").symlink_to("pack")  # a second way to a folder is no loop
    (fp8_model / ".git").symlink_to(fp8_model)
    (fp8_model / "adapter.safetensors.index.json").write_text("{}")
    report = convert(fp8_model, tmp_path / "out", BF16)
    out = tmp_path / "out"
    for name, text in (
        ("tokenizer.json", "one"),
        ("absolute.txt", "one"),
        ("pack/deep/a.py", "a"),
        ("again/deep/a.py", "a"),
    ):
        assert (out / name).read_text() == text and name in report.others
    assert not any(p.is_symlink() for p in out.rglob("*"))
    assert report.left_out == (".git/", "adapter.safetensors.index.json")


def test_half_a_surrogate_pair_is_written_again_as_it_came(
    fp8_model: Path, tmp_path: Path, fp8_tensors: dict[str, Tensor]
) -> None:
    odd = "/data/mod\udce9le"
    config = json.loads((fp8_model / "config.json").read_text())
    config |= {"_name_or_path": odd, "quantization_config": {"quant_method": "fp8", "ignored_layers": [odd]}}
    (fp8_model / "config.json").write_text(json.dumps(config))
    listing = json.loads((fp8_model / INDEX_FILE).read_text()) | {"metadata": {"made by": odd, "ä": 1}}
    (fp8_model / INDEX_FILE).write_text(json.dumps(listing))
    (fp8_model / "hf_quant_config.json").write_text(json.dumps({"quantization": {"by": odd}}))
    convert(fp8_model, tmp_path / "out", UPCAST)
    found = {p.name: json.loads(p.read_bytes()) for p in (tmp_path / "out").glob("*.json")}
    assert found["config.json"]["_name_or_path"] == odd
    assert found["config.json"]["quantization_config"]["ignored_layers"][0] == odd
    assert found[INDEX_FILE]["metadata"]["made by"] == odd
    assert found["hf_quant_config.json"]["quantization"]["by"] == odd
