"""A conversion that was cut short: what is gone on with, what is not, and the order in which files appear."""

import fcntl
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from killed_conversions import digest, is_refused
from refused_conversions import refuse

from saccade.checkpoint.index import read_index
from saccade.checkpoint.open import JOURNAL
from saccade.convert import stream
from saccade.convert.changes import Mode
from saccade.convert.convert import convert
from saccade.convert.target import LOCK
from saccade.errors import ConvertError

UPCAST, BF16 = Mode("upcast", ("indexer.wk",)), Mode("bf16")
SHARD = "model-0000{}-of-00003.safetensors"


def begin(fp8_model: Path, out: Path, monkeypatch: pytest.MonkeyPatch, mode: Mode = BF16) -> None:
    """A conversion that was interrupted when it began its last file."""
    fill = stream.fill_output

    def interrupted(index: Any, output: Any, *args: Any) -> None:
        if output.name == SHARD.format(3):
            raise KeyboardInterrupt
        fill(index, output, *args)

    with monkeypatch.context() as patch:
        patch.setattr(stream, "fill_output", interrupted)
        with pytest.raises(KeyboardInterrupt):
            convert(fp8_model, out, mode, threads=1)
    assert is_refused(out) and (out / SHARD.format(1)).exists()


def test_finished_files_are_kept_and_others_made_again(
    fp8_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bf16_digest: dict[str, str]
) -> None:
    out = tmp_path / "out"
    begin(fp8_model, out, monkeypatch)
    (out / SHARD.format(2)).write_bytes(b"somebody was here")
    kept = (out / SHARD.format(1)).stat()
    report = convert(fp8_model, out, BF16)
    assert (out / SHARD.format(1)).stat().st_ino == kept.st_ino
    assert report.kept_files == 1 and digest(out) == bf16_digest


def test_a_beginning_of_something_else_is_not_gone_on_with(
    fp8_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    begin(fp8_model, out, monkeypatch)
    refuse("holds the beginning of --bf16 of .*, this is --upcast indexer.wk", fp8_model, out, UPCAST)
    # Another fine-tune of the same model: the same names, sizes and headers, and its time stamps put back.
    path = fp8_model / SHARD.format(3)
    times, whole = path.stat(), path.read_bytes()
    content = bytearray(whole)
    content[-1 - len(content) // 2 :] = bytes(1 + len(content) // 2)
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    refuse("as it was then, not of this", fp8_model, out)
    path.write_bytes(whole)
    # One scale mended in place, between the samples.
    index = read_index(fp8_model)
    scale = next(e for e in index.entries.values() if e.file == path.name and e.name.endswith("weight_scale_inv"))
    mended = bytearray(whole)
    mended[scale.start : scale.stop] = bytes(reversed(mended[scale.start : scale.stop]))
    assert mended != whole
    path.write_bytes(mended)
    refuse("as it was then, not of this", fp8_model, out)
    (out / JOURNAL).write_text("{")
    refuse("is no journal of a conversion", fp8_model, out)


def test_a_source_that_was_moved_is_still_the_same(
    fp8_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bf16_digest: dict[str, str]
) -> None:
    begin(fp8_model, tmp_path / "out", monkeypatch)
    moved = shutil.copytree(fp8_model, tmp_path / "moved")  # other inodes, other time stamps
    shutil.rmtree(fp8_model)
    convert(moved, tmp_path / "out", BF16)
    assert digest(tmp_path / "out") == bf16_digest


def test_two_conversions_do_not_write_to_one_place(
    fp8_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    begin(fp8_model, out, monkeypatch)
    before = digest(out)
    with open(out / LOCK, "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(ConvertError, match="another conversion is writing to it"):
            convert(fp8_model, out, BF16)
    (out / LOCK).unlink()
    assert digest(out) == before


# `stream` imports torch, which would otherwise take a second in each of 16 processes.
RACER = """
import os, sys, time
import saccade.convert.stream
from saccade.convert.changes import Mode
from saccade.convert.convert import convert
model, out, children = sys.argv[1], sys.argv[2], []
for place in range(4):
    start = time.monotonic() + 0.05  # all at once
    for _ in range(4):
        child = os.fork()
        if child == 0:
            while time.monotonic() < start:
                pass
            try:
                convert(model, f"{out}/{place}", Mode("bf16"), threads=1)
                os.write(1, b"won\\n")
            except BaseException as e:
                os.write(1, f"{type(e).__name__} {e}\\n".replace(f"{out}/{place}", "OUT").encode())
            os._exit(0)
        children.append(child)
    for child in children[-4:]:
        os.waitpid(child, 0)
"""


def test_of_several_that_start_at_once_one_converts_and_the_others_say_why_not(
    fp8_model: Path, tmp_path: Path, bf16_digest: dict[str, str]
) -> None:
    command = [sys.executable, "-c", RACER, str(fp8_model), str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    told = Counter(ran.stdout.splitlines())
    assert told.pop("won") == 4
    busy = "ConvertError OUT: another conversion is writing to it; wait for that to end"
    assert told.pop(busy) > 4
    assert not told or set(told) == {"ConvertError OUT: holds a model already; choose a new or an empty directory"}
    assert all(digest(tmp_path / str(place)) == bf16_digest for place in range(4))


@pytest.mark.parametrize("name", ["stray.safetensors", "other.safetensors.index.json"])
def test_tensors_of_somebody_else_are_named_and_not_made_a_part_of_the_result(
    name: str, fp8_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bf16_digest: dict[str, str]
) -> None:
    out = tmp_path / "out"
    words = f"out: holds {name}, which is none of this conversion's files; move it away; what is finished stays"
    begin(fp8_model, out, monkeypatch)
    shutil.copy(fp8_model / SHARD.format(1), out / name)
    refuse(words, fp8_model, out)
    (out / name).unlink()
    copied = []
    with monkeypatch.context() as patch:  # now while the last file is filled
        fill = stream.fill_output
        patch.setattr(
            stream,
            "fill_output",
            lambda *a: (fill(*a), copied.append(shutil.copy(fp8_model / "config.json", out / name))),
        )
        with pytest.raises(ConvertError, match=words):
            convert(fp8_model, out, BF16)
    assert copied and is_refused(out)
    (out / name).unlink()
    convert(fp8_model, out, BF16)
    assert digest(out) == bf16_digest


def test_an_interrupted_begin_is_no_obstacle(fp8_model: Path, tmp_path: Path, bf16_digest: dict[str, str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / f".{JOURNAL}.part").write_text("{")  # killed while the journal was written
    convert(fp8_model, tmp_path / "out", BF16)
    assert digest(tmp_path / "out") == bf16_digest


def test_config_json_is_the_last_to_appear(fp8_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append(Path(b).name), replace(a, b)))
    convert(fp8_model, tmp_path / "out", BF16)
    assert order[0] == JOURNAL and order[-2:] == ["model.safetensors.index.json", "config.json"]
    assert sorted(order[1:-2]) == [SHARD.format(k) for k in (1, 2, 3)]


def test_a_name_is_given_after_the_bytes_are_on_the_disk(
    fp8_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: set[int] = set()
    fsync, replace = os.fsync, os.replace

    def note(descriptor: int) -> None:
        fsync(descriptor)
        synced.add(os.fstat(descriptor).st_ino)

    def judge(a: Any, b: Any) -> None:
        assert os.stat(a).st_ino in synced, f"{b} has a name, but its bytes may be lost"
        replace(a, b)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(os, "replace", judge)
    convert(fp8_model, tmp_path / "out", BF16)
    assert len(synced) >= 6
