"""What cannot be converted, or not to there: refused in one line, before anything is written."""

import errno
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from commands import Run
from killed_conversions import is_refused
from refused_conversions import failing, refuse
from small_checkpoints import small_config, write_small

from saccade.checkpoint.open import JOURNAL
from saccade.convert import target
from saccade.convert.changes import Mode
from saccade.convert.convert import convert
from saccade.errors import ConvertError, PlanError, RequestError, SaccadeError

UPCAST, BF16, FP8 = Mode("upcast", ("indexer.wk",)), Mode("bf16"), Mode("fp8")


def test_a_place_in_or_around_the_model_is_refused(fp8_model: Path, tmp_path: Path) -> None:
    refuse("is the model itself", fp8_model, fp8_model)
    refuse("is inside the model itself", fp8_model, fp8_model / "out")
    refuse("is inside the model itself", fp8_model, fp8_model / "deep" / "out")
    refuse("holds the model itself", fp8_model, tmp_path)
    (tmp_path / "link").symlink_to(fp8_model)
    refuse("is the model itself", fp8_model, tmp_path / "link")
    assert not (fp8_model / "out").exists()


HOSTILE = "a\nb\x1b[2J\u202ec"
SHOWN = r"a\nb\x1b[2J\u202ec"


def test_names_of_places_are_on_one_line_whatever_they_hold(
    fp8_model: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line break and what a terminal obeys, in OUT and in the source, in refusals, reports and after Ctrl-C."""
    model, out = fp8_model.rename(tmp_path / HOSTILE), tmp_path / "out" / HOSTILE

    def tell(*line: object) -> list[str]:
        ran = run("convert", *line)
        assert SHOWN in ran.out + ran.err and "\x1b" not in ran.out + ran.err and "\u202e" not in ran.out + ran.err
        assert not any(text.startswith("b") for text in (ran.out + ran.err).splitlines())
        return ran.err.splitlines()

    out.mkdir(parents=True)
    (out / "x").touch()
    assert len(tell(model, out, "--bf16")) == 1  # holds x
    assert len(tell(model, out / "x", "--bf16")) == 1  # is a file
    assert len(tell(model, model, "--bf16")) == len(tell(model, model / "out", "--bf16")) == 1
    assert len(tell(model, tmp_path / "fine", "--upcast", "nobody")) == 1
    assert len(tell(model, tmp_path / "fine", "--upcast", "weights_proj")) == 1  # plain already
    (out / "x").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(os, "mkdir", failing(os.mkdir, 1, errno.EACCES))
        assert len(tell(model, out / "y", "--bf16")) == 1
    journal = {"source": HOSTILE, "option": "--fp8", "identity": "0"}
    for values in (journal, journal | {"option": "--bf16"}):
        (out / JOURNAL).write_text(json.dumps(values))
        assert len(tell(model, out, "--bf16")) == 1
    (out / JOURNAL).write_text("no journal")
    assert len(tell(model, out, "--bf16")) == 1
    (out / JOURNAL).unlink()
    with monkeypatch.context() as patch:
        patch.setattr(target, "require_space", interrupt)
        assert len(tell(model, out, "--bf16")) == 1
    assert len(tell(model, out, "--bf16", "--link", "sym")) == 1  # done
    (model / "config.json").write_text("{")
    assert len(tell(model, tmp_path / "fine", "--bf16")) == 1


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("name, reason", [("x" * 300, "File name too long"), ("a\0b", "embedded null byte")])
def test_a_place_that_no_file_system_has_is_refused(name: str, reason: str, fp8_model: Path, tmp_path: Path) -> None:
    refuse(f"^{tmp_path}/(x+|a.x00b): cannot be opened: {reason}$", fp8_model, tmp_path / name)


def test_a_place_that_is_taken_is_refused(fp8_model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refuse("is a file; expected a new or an empty directory", fp8_model, tmp_path / "file")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    refuse("holds notes.txt; expected a new or an empty directory", fp8_model, tmp_path / "used")
    convert(fp8_model, tmp_path / "done", BF16)
    refuse("holds a model already", fp8_model, tmp_path / "done")


def test_a_place_that_cannot_be_written_to_is_refused(
    fp8_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    refuse("cannot be (written to|opened): Not a directory", fp8_model, tmp_path / "file" / "out")
    for code in (errno.EACCES, errno.EROFS):
        with monkeypatch.context() as patch:
            patch.setattr(os, "mkdir", failing(os.mkdir, 1, code))
            refuse(f"out: cannot be written to: {os.strerror(code)}", fp8_model, tmp_path / "out")
    monkeypatch.setattr(os, "fsync", failing(os.fsync, 1, errno.ENOSPC))
    with pytest.raises(ConvertError, match="cannot be written to: No space left on device"):
        convert(fp8_model, tmp_path / "out", BF16)
    assert is_refused(tmp_path / "out")


def test_a_full_disk_is_seen_before_anything_is_written(
    fp8_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1_000_000))
    refuse(r"the result needs [\d,]+ bytes more, its disk has 1,000,000 free", fp8_model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_that_would_not_load_is_refused(tmp_path: Path, fp8_tensors: dict[str, torch.Tensor]) -> None:
    name = "model.layers.1.self_attn.indexer.wk.weight"
    broken = {n: t for n, t in fp8_tensors.items() if n != name + "_scale_inv"}
    root = write_small(tmp_path / "m", small_config(), broken)
    refuse(f"missing-scale: {name}", root, tmp_path / "out", UPCAST, PlanError)
    refuse("no such directory", tmp_path / "nothing", tmp_path / "out", BF16, SaccadeError)
    assert not (tmp_path / "out").exists()


def test_what_no_parameter_uses_is_not_judged_where_it_stays(
    tmp_path: Path, fp8_tensors: dict[str, torch.Tensor]
) -> None:
    """The indexer of a layer that reuses a selection lacks a scale: an upcast of others lets it be, --bf16 cannot."""
    name = "model.layers.1.self_attn.indexer.wq_b.weight"
    given = {n: t for n, t in fp8_tensors.items() if n != name + "_scale_inv"}
    root = write_small(tmp_path / "m", small_config(indexer_types=["full", "shared", "full"]), given)
    convert(root, tmp_path / "out", UPCAST)
    assert not is_refused(tmp_path / "out")
    refuse(name, root, tmp_path / "other", BF16, PlanError)


@pytest.mark.parametrize("threads", [0, -1, True])
def test_threads_are_counted_from_one(threads: int, fp8_model: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="threads: expected an integer of at least 1"):
        convert(fp8_model, tmp_path / "out", BF16, threads=threads)


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        (Mode("upcast", ("indexer.kw",)), r"no module is called indexer.kw; did you mean .*indexer.wk"),
        (
            Mode("upcast", ("indexer.wk", "indexr.wq_b.weight")),
            "no module is called indexr.wq_b.weight; did you mean ind",
        ),
        (Mode("upcast", ("model.layers.3.self_atn.indexer",)), r"did you mean self_attn.indexer"),
        (Mode("upcast", ("model.layers.9.self_attn.indexer.wk",)), r"did you mean indexer.wk"),
        (Mode("upcast", ("indexer.k_norm.bias",)), r"no module is called indexer.k_norm.bias; did you mean .*k_norm"),
        (Mode("upcast", ("weights_proj",)), r"m: model.layers.{0-3}.self_attn.indexer.weights_proj: plain numbers alr"),
        (Mode("upcast", ("*norm*",)), r"k_norm and \d+ more: plain numbers already, nothing to convert$"),
        (FP8, "is stored as FP8 128x128; --fp8 encodes plain numbers: convert it with --bf16 first"),
    ],
)
def test_what_makes_no_sense_for_this_model_is_refused(
    mode: Mode, words: str, fp8_tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    write_small(tmp_path / "m", small_config(), fp8_tensors)
    with pytest.raises(ConvertError, match=words) as error:
        convert(tmp_path / "m", tmp_path / "out", mode)
    assert not re.search("\n", str(error.value)) and not (tmp_path / "out").exists()


def test_a_bf16_model_has_nothing_to_decode(fp8_tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    write_small(tmp_path / "m", small_config(), fp8_tensors)
    convert(tmp_path / "m", tmp_path / "plain", BF16)
    with pytest.raises(ConvertError, match="is BF16 throughout"):
        convert(tmp_path / "plain", tmp_path / "out", BF16)
    assert not (tmp_path / "out").exists()
