"""`convert --link`: files in which nothing changes become links, and nobody writes through them."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Run
from killed_conversions import digest, is_refused
from small_checkpoints import small_config, write_small

from saccade.checkpoint.open import JOURNAL
from saccade.convert import stream
from saccade.convert.changes import Mode
from saccade.convert.convert import convert
from saccade.convert.links import Ahead
from saccade.convert.place import Place
from saccade.errors import ConvertError, RequestError

UPCAST, BF16 = Mode("upcast", ("layers.1.self_attn.indexer.wk",)), Mode("bf16")
SHARD = "model-0000{}-of-00004.safetensors"


@pytest.fixture
def model(tmp_path: Path, fp8_tensors: dict[str, torch.Tensor]) -> Path:
    """A file a layer, so that an upcast of one layer's module changes the second of four."""
    root = tmp_path / "m"
    write_small(root, small_config(), fp8_tensors, lambda n: int(n.split(".")[2]) if "layers" in n else 0)
    (root / "tokenizer.json").write_text("{}")
    return root


@pytest.fixture
def cached(model: Path) -> Path:
    """The same as the Hub's cache keeps it: names are relative links to blobs."""
    blobs = model.parent / "blobs"
    blobs.mkdir()
    for k, path in enumerate(sorted(model.iterdir())):
        path.rename(blobs / f"blob{k}")
        path.symlink_to(f"../blobs/blob{k}")
    return model


def how(path: Path, source: Path) -> str:
    if path.is_symlink():
        assert os.readlink(path) == str(source.resolve())  # absolute, to the file itself
        return "sym"
    return "hard" if path.samefile(source) else "copy"


@pytest.mark.parametrize("link", [None, "hard", "sym", "copy"])
@pytest.mark.parametrize("kind", ["model", "cached"])
def test_unchanged_files_become_links_and_the_others_are_new(
    kind: str, link: str | None, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    root: Path = request.getfixturevalue(kind)
    before, told = digest(root), list[Ahead]()
    report = convert(root, tmp_path / "out", UPCAST, link=link, ahead=told.append)
    hows = {k: how(tmp_path / "out" / SHARD.format(k), root / SHARD.format(k)) for k in (1, 2, 3, 4)}
    wanted = link or "hard"
    assert hows == {1: wanted, 2: "copy", 3: wanted, 4: wanted}
    assert report.whole == {wanted: 3} == told[0].whole and (told[0].files, told[0].changed) == (4, 1)
    assert told[0].changed_bytes == (tmp_path / "out" / SHARD.format(2)).stat().st_size
    assert how(tmp_path / "out" / "tokenizer.json", root / "tokenizer.json") == "copy"
    assert not is_refused(tmp_path / "out") and digest(root) == before
    convert(tmp_path / "out", tmp_path / "plain", BF16)  # what is linked can be read, and is not written to
    assert digest(root) == before


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_links_that_are_refused_become_copies_or_a_refusal(
    code: int, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse_link(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", refuse_link)
    for link, call, cure in (("hard", "link", "use --link copy, or --link sym"), ("sym", "symlink", "use --link copy")):
        monkeypatch.setattr(os, call, refuse_link)
        words = f"{SHARD.format(1)}: cannot be a .* link in {tmp_path}/out: {os.strerror(code)}; nothing was written; {cure}$"
        with pytest.raises(ConvertError, match=words.replace(", or", ", or")):
            convert(model, tmp_path / "out", UPCAST, link=link)
        assert not (tmp_path / "out").exists()
    told: list[Ahead] = []
    report = convert(model, tmp_path / "out", UPCAST, ahead=told.append)
    assert report.whole == {"copy": 3} and told[0].reason == os.strerror(code)
    assert not is_refused(tmp_path / "out")


def test_another_real_file_system_gets_copies(model: Path, tmp_path: Path) -> None:
    there = Path("/dev/shm")
    if not there.is_dir() or there.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("this machine has no second file system to write to")
    out = there / f"saccade-{os.getpid()}"
    try:
        assert convert(model, out, UPCAST).whole == {"copy": 3}
        shutil.rmtree(out)
        with pytest.raises(ConvertError, match="cannot be a hard link"):
            convert(model, out, UPCAST, link="hard")
        assert not out.exists()
    finally:
        shutil.rmtree(out, ignore_errors=True)


@pytest.mark.parametrize(("first", "second"), [("hard", "copy"), ("sym", "copy"), ("copy", "hard"), ("hard", "sym"), ("sym", None), (None, None)])  # fmt: skip
def test_the_rest_of_a_conversion_is_there_as_the_second_run_asks(
    first: str | None, second: str | None, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, fill, before = tmp_path / "out", stream.fill_output, digest(model)

    def interrupted(index: Any, output: Any, *args: Any) -> None:
        if output.name == SHARD.format(4) or not output.whole and first != "copy":
            raise KeyboardInterrupt
        fill(index, output, *args)

    with monkeypatch.context() as patch:
        patch.setattr(stream, "fill_output", interrupted)
        with pytest.raises(KeyboardInterrupt):
            convert(model, out, UPCAST, link=first)
    assert is_refused(out) and how(out / SHARD.format(1), model / SHARD.format(1)) == (first or "hard")
    report = convert(model, out, UPCAST, link=second)
    assert sum(report.whole.values()) == 3 and digest(model) == before
    hows = [how(out / SHARD.format(k), model / SHARD.format(k)) for k in (1, 3, 4)]
    assert hows == [second or first or "hard"] * 3
    convert(model, tmp_path / "once", UPCAST)
    assert digest(out) == digest(tmp_path / "once")


def test_only_what_is_written_needs_room(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    free = (model / SHARD.format(2)).stat().st_size + 1_000_000
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=free))
    with pytest.raises(ConvertError, match="bytes more, its disk has"):
        convert(model, tmp_path / "out", UPCAST, link="copy")
    assert not (tmp_path / "out").exists()
    with monkeypatch.context() as patch:  # on one device, and yet no links: seen when they are tried
        patch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(errno.EPERM, "no")))
        with pytest.raises(ConvertError, match="bytes more, its disk has"):
            convert(model, tmp_path / "out", UPCAST)
        assert not (tmp_path / "out").exists()
    convert(model, tmp_path / "out", UPCAST)


@pytest.mark.parametrize("make", [os.link, os.symlink])
def test_a_file_that_is_made_is_a_new_one(make: Callable[[Path, Path], None], tmp_path: Path) -> None:
    """Whatever stands under its names: both lead to somebody else's bytes."""
    source = tmp_path / "source"
    source.write_text("mine")
    for name in (".a.part", "a"):
        make(source, tmp_path / name)
    Place(tmp_path).write("a", b"new")
    assert source.read_text() == "mine" and (tmp_path / "a").read_text() == "new"


def test_the_command_says_beforehand_what_changes_and_what_is_shared(model: Path, tmp_path: Path, run: Run) -> None:
    code, out, err = run("convert", model, tmp_path / "a", "--upcast", "layers.1.self_attn.indexer.wk")
    assert code == 0 and err.startswith("saccade: 1 of 4 files with tensors to change, 2.")
    shared = f"hard links, so {model} shares these bytes: change them in neither folder\n"
    assert err.endswith(shared) and "3 unchanged" in out and shared in out
    code, _, err = run("convert", model, tmp_path / "b", "--upcast", "indexer.wk", "--link", "soft")
    assert code == 2 and err == "saccade: --link: expected one of hard, sym, copy, found 'soft'\n"
    assert not (tmp_path / "b").exists() and not (tmp_path / "b" / JOURNAL).exists()
    with pytest.raises(RequestError):
        convert(model, tmp_path / "b", UPCAST, link="Hard")
