"""What can go wrong with a conversion: one clear line, nothing that looks whole, and a way on."""

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import small_config, small_tensors, write_small
from killed import digest, is_refused

from saccade.checkpoint import read
from saccade.cli import app
from saccade.convert import stream, target
from saccade.convert.changes import Mode
from saccade.convert.convert import convert
from saccade.convert.target import JOURNAL
from saccade.errors import ConvertError, PlanError, RequestError, SaccadeError

UPCAST, BF16, FP8 = Mode("upcast", ("indexer.wk",)), Mode("bf16"), Mode("fp8")
SHARD = "model-0000{}-of-00003.safetensors"


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    return small_tensors(small_config())


@pytest.fixture
def model(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    return write_small(tmp_path / "m", small_config(), tensors, lambda name: len(name) % 3)


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("wanted")
    convert(write_small(folder / "m", small_config(), tensors, lambda n: len(n) % 3), folder / "out", BF16, threads=2)
    return digest(folder / "out")


def refuse(words: str, model: Path, out: Path, mode: Mode = BF16, kind: type[SaccadeError] = ConvertError) -> None:
    """The conversion is refused in one line with these words, and changes nothing anywhere."""
    before = digest(model.parent)
    with pytest.raises(kind, match=words) as error:
        convert(model, out, mode)
    assert kind is PlanError or "\n" not in str(error.value)
    assert digest(model.parent) == before


def test_a_place_in_or_around_the_model_is_refused(model: Path, tmp_path: Path) -> None:
    refuse("is the model itself", model, model)
    refuse("is inside the model itself", model, model / "out")
    refuse("is inside the model itself", model, model / "deep" / "out")
    refuse("holds the model itself", model, tmp_path)
    (tmp_path / "link").symlink_to(model)
    refuse("is the model itself", model, tmp_path / "link")
    assert not (model / "out").exists()


def test_a_place_that_is_taken_is_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refuse("is a file; expected a new or an empty directory", model, tmp_path / "file")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    refuse("holds notes.txt; expected a new or an empty directory", model, tmp_path / "used")
    convert(model, tmp_path / "done", BF16)
    refuse("holds a model already", model, tmp_path / "done")


def test_a_place_that_cannot_be_written_to_is_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    refuse("cannot be (written to|opened): Not a directory", model, tmp_path / "file" / "out")
    for code in (errno.EACCES, errno.EROFS):
        with monkeypatch.context() as patch:
            patch.setattr(os, "mkdir", failing(os.mkdir, 1, code))
            refuse(f"out: cannot be written to: {os.strerror(code)}", model, tmp_path / "out")
    monkeypatch.setattr(os, "fsync", failing(os.fsync, 1, errno.ENOSPC))
    with pytest.raises(ConvertError, match="cannot be written to: No space left on device"):
        convert(model, tmp_path / "out", BF16)
    assert is_refused(tmp_path / "out")


def test_a_full_disk_is_seen_before_anything_is_written(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1_000_000))
    refuse(r"the result needs [\d,]+ bytes more, its disk has 1,000,000 free", model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_that_would_not_load_is_refused(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    name = "model.layers.1.self_attn.indexer.wk.weight"
    broken = {n: t for n, t in tensors.items() if n != name + "_scale_inv"}
    root = write_small(tmp_path / "m", small_config(), broken)
    refuse(f"missing-scale: {name}", root, tmp_path / "out", UPCAST, PlanError)
    refuse("no such directory", tmp_path / "nothing", tmp_path / "out", BF16, SaccadeError)
    assert not (tmp_path / "out").exists()


def test_what_no_parameter_uses_is_not_judged_where_it_stays(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """The indexer of a layer that reuses a selection lacks a scale: an upcast of others lets it be, --bf16 cannot."""
    name = "model.layers.1.self_attn.indexer.wq_b.weight"
    given = {n: t for n, t in tensors.items() if n != name + "_scale_inv"}
    root = write_small(tmp_path / "m", small_config(indexer_types=["full", "shared", "full"]), given)
    convert(root, tmp_path / "out", UPCAST)
    assert not is_refused(tmp_path / "out")
    refuse(name, root, tmp_path / "other", BF16, PlanError)


def failing(call: Callable[..., Any], at: int, code: int) -> Callable[..., Any]:
    """`call`, whose `at`-th use fails as the system would."""
    left = [at]

    def fail(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise OSError(code, os.strerror(code))
        return call(*args, **kwargs)

    return fail


@pytest.mark.parametrize(("call", "at"), [("pwrite", 1), ("pwrite", 40), ("fsync", 3), ("fsync", 5), ("replace", 6)])
def test_a_disk_that_fills_up_leaves_a_beginning_to_go_on_from(
    call: str, at: int, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: dict[str, str]
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing(getattr(os, call), at, errno.ENOSPC))
        with pytest.raises(ConvertError, match="No space left on device; .* run the same command again") as error:
            convert(model, out, BF16, threads=2)
    assert "\n" not in str(error.value)
    assert is_refused(out) and (out / JOURNAL).exists()
    assert not list(out.glob(".*.part"))  # the disk is full: what is of no use goes
    convert(model, out, BF16)
    assert digest(out) == wanted


def test_a_real_limit_of_the_system_is_one_line(model: Path, tmp_path: Path) -> None:
    program = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20));"
        "from saccade.cli import main; sys.argv[0] = 'saccade'; main()"
    )
    command = [sys.executable, "-c", program, "convert", str(model), str(tmp_path / "out"), "--bf16"]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 2 and ran.stdout == ""
    assert len(ran.stderr.splitlines()) == 1 and "File too large; what is finished stays" in ran.stderr
    assert is_refused(tmp_path / "out")


def at_read(monkeypatch: pytest.MonkeyPatch, count: int, act: Callable[[], None]) -> None:
    """Do something to the source at the `count`-th read."""
    left, before = [count], read.Reader.read

    def watched(self: read.Reader, span: read.Span) -> None:
        left[0] -= 1
        if left[0] == 0:
            act()
        before(self, span)

    monkeypatch.setattr(read.Reader, "read", watched)


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda path: path.unlink(), "cannot be read: No such file or directory"),
        (lambda path: os.truncate(path, 5000), "has become shorter since its header was read"),
    ],
)
def test_a_source_file_that_goes_away(
    act: Callable[[Path], None],
    words: str,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    wanted: dict[str, str],
) -> None:
    path, out = model / SHARD.format(3), tmp_path / "out"
    content = path.read_bytes()
    with monkeypatch.context() as patch:
        at_read(patch, 3, lambda: act(path))
        with pytest.raises(ConvertError, match=rf"{path.name}.*{words}.*run the same command again") as error:
            convert(model, out, BF16, threads=1)
    assert "\n" not in str(error.value) and is_refused(out)
    path.write_bytes(content)
    convert(model, out, BF16)
    assert digest(out) == wanted


def test_a_source_that_changes_meanwhile_is_noticed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = model / SHARD.format(2)

    def retrain() -> None:
        content = bytearray(path.read_bytes())
        content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
        path.write_bytes(content)

    at_read(monkeypatch, 5, retrain)
    with pytest.raises(ConvertError, match="changed while it was read"):
        convert(model, tmp_path / "out", BF16, threads=1)
    assert is_refused(tmp_path / "out")


def test_numbers_without_an_encoding_are_named(tmp_path: Path, model: Path) -> None:
    convert(model, tmp_path / "plain", BF16)
    name = "model.layers.2.self_attn.o_proj.weight"
    from safetensors.torch import load_file, save_file

    for file in (tmp_path / "plain").glob("*.safetensors"):
        found = load_file(file)
        if name in found:
            found[name][200, 3] = float("nan")
            save_file(found, file, metadata={"format": "pt"})
    with pytest.raises(ConvertError, match=f"{name}: a matrix with NaN or infinity") as error:
        convert(tmp_path / "plain", tmp_path / "out", FP8)
    assert "rows" in str(error.value) and is_refused(tmp_path / "out")


def begin(model: Path, out: Path, monkeypatch: pytest.MonkeyPatch, mode: Mode = BF16) -> None:
    """A conversion that was interrupted when it began its last file."""
    fill = stream.fill

    def interrupted(index: Any, output: Any, *args: Any) -> None:
        if output.name == SHARD.format(3):
            raise KeyboardInterrupt
        fill(index, output, *args)

    with monkeypatch.context() as patch:
        patch.setattr(stream, "fill", interrupted)
        with pytest.raises(KeyboardInterrupt):
            convert(model, out, mode, threads=1)
    assert is_refused(out) and (out / SHARD.format(1)).exists()


def test_finished_files_are_kept_and_others_made_again(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: dict[str, str]
) -> None:
    out = tmp_path / "out"
    begin(model, out, monkeypatch)
    (out / SHARD.format(2)).write_bytes(b"somebody was here")
    kept = (out / SHARD.format(1)).stat()
    report = convert(model, out, BF16)
    assert (out / SHARD.format(1)).stat().st_ino == kept.st_ino
    assert report.kept_files == 1 and digest(out) == wanted


def test_a_beginning_of_something_else_is_not_gone_on_with(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    begin(model, out, monkeypatch)
    refuse("holds the beginning of --bf16 of .*, this is --upcast indexer.wk", model, out, UPCAST)
    # Another fine-tune of the same model: the same names, sizes and headers, and its time stamps put back.
    path = model / SHARD.format(3)
    times, content = path.stat(), bytearray(path.read_bytes())
    content[-1 - len(content) // 2 :] = bytes(1 + len(content) // 2)
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    refuse("as it was then, not of this", model, out)
    (out / JOURNAL).write_text("{")
    refuse("is no journal of a conversion", model, out)


def test_a_source_that_was_moved_is_still_the_same(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: dict[str, str]
) -> None:
    begin(model, tmp_path / "out", monkeypatch)
    moved = shutil.copytree(model, tmp_path / "moved")  # other inodes, other time stamps
    shutil.rmtree(model)
    convert(moved, tmp_path / "out", BF16)
    assert digest(tmp_path / "out") == wanted


def test_two_conversions_do_not_write_to_one_place(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    begin(model, out, monkeypatch)
    before = digest(out)
    with open(out / JOURNAL) as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(ConvertError, match="another conversion is writing to it"):
            convert(model, out, BF16)
    assert digest(out) == before


def test_config_json_is_the_last_to_appear(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append(Path(b).name), replace(a, b)))
    convert(model, tmp_path / "out", BF16)
    assert order[0] == JOURNAL and order[-2:] == ["model.safetensors.index.json", "config.json"]
    assert sorted(order[1:-2]) == [SHARD.format(k) for k in (1, 2, 3)]


def test_a_name_is_given_after_the_bytes_are_on_the_disk(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    convert(model, tmp_path / "out", BF16)
    assert len(synced) >= 6


def test_an_interrupted_begin_is_no_obstacle(model: Path, tmp_path: Path, wanted: dict[str, str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / f".{JOURNAL}.part").write_text("{")  # killed while the journal was written
    convert(model, tmp_path / "out", BF16)
    assert digest(tmp_path / "out") == wanted


@pytest.mark.parametrize("threads", [0, -1, True])
def test_threads_are_counted_from_one(threads: int, model: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="threads: expected an integer of at least 1"):
        convert(model, tmp_path / "out", BF16, threads=threads)


def command(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        app([str(a) for a in args], prog_name="saccade")
    out, err = capsys.readouterr()
    return int(end.value.code or 0), out, err


def test_the_command_converts_and_says_what_it_did(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = command(capsys, "convert", model, tmp_path / "a", "--upcast", "indexer.wk", "--threads", "2")
    assert (code, err) == (0, "")  # no progress bar where no terminal is
    assert out.startswith(f"{tmp_path / 'a'}: complete, --upcast indexer.wk of {model}\n")
    assert "FP8 128x128 -> BF16    4 tensors" in out and "every number is the same as before, bit for bit" in out
    assert command(capsys, "check", tmp_path / "a")[0] == 0
    code, out, _ = command(capsys, "convert", model, tmp_path / "b", "--bf16", "--json", "--threads", "1")
    told = json.loads(out)
    assert told["mode"] == "--bf16" and told["threads"] == 1 and told["roundings"] == {}
    assert told["size"] == sum(p.stat().st_size for p in (tmp_path / "b").glob("*.safetensors"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "expected one of --upcast MODULE, --bf16 and --fp8, found none of them"),
        (["--bf16", "--fp8"], "found --bf16 and --fp8"),
        (["--upcast", ""], "expected a module's name or its end"),
        (["--bf16", "--threads", "0"], "threads: expected an integer of at least 1, found 0"),
        (["--fp8"], "convert it with --bf16 first"),
    ],
)
def test_the_command_refuses_in_one_line(
    options: list[str], words: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = command(capsys, "convert", model, tmp_path / "out", *options)
    assert code == 2 and out == "" and len(err.splitlines()) == 1 and words in err
    assert not (tmp_path / "out").exists()


INTERRUPTED = """
import os, signal
write, calls = os.pwrite, []
def pwrite(*args):
    calls.append(args)
    if len(calls) == 60:
        os.kill(os.getpid(), signal.SIGINT)
    return write(*args)
os.pwrite = pwrite
from saccade.cli import main
main()
"""


def test_ctrl_c_is_one_line_that_says_how_to_go_on(model: Path, tmp_path: Path, wanted: dict[str, str]) -> None:
    out = tmp_path / "out"
    arguments = ["convert", str(model), str(out), "--bf16", "--threads", "2"]
    ran = subprocess.run([sys.executable, "-c", INTERRUPTED, *arguments], capture_output=True, text=True, timeout=60)
    text = "interrupted; what is finished stays: run the same command again to go on"
    assert (ran.returncode, ran.stdout, ran.stderr) == (130, "", f"saccade: {out}: {text}\n")
    assert (out / JOURNAL).exists() and is_refused(out) and not list(out.glob(".*.part"))
    convert(model, out, BF16)
    assert digest(out) == wanted


def test_ctrl_c_before_the_beginning_says_that_nothing_was_written(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(target, "require_space", interrupt)
    code, out, err = command(capsys, "convert", model, tmp_path / "out", "--bf16")
    assert (code, out, err) == (130, "", f"saccade: {tmp_path / 'out'}: interrupted; nothing was written\n")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("model_type", "words"),
    [
        ("glm5_next", '"glm5_next", an architecture that is not implemented; '),
        ("hy_v4", '"hy_v4", an architecture that is not implemented; '),
        (None, "null; "),
    ],
)
def test_a_model_that_is_not_known_is_refused_by_its_type(
    model_type: str | None, words: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (model / "config.json").write_text(json.dumps(small_config(model_type=model_type)))
    code, _, err = command(capsys, "convert", model, tmp_path / "out", "--bf16")
    assert code == 2 and len(err.splitlines()) == 1 and not (tmp_path / "out").exists()
    assert f"config.json: model_type is {words}supported: deepseek_v32, glm_moe_dsa" in err
