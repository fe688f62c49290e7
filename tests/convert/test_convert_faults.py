"""What can go wrong while a conversion runs: one clear line, nothing that looks whole, and a way on."""

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from killed_conversions import digest, is_refused
from refused_conversions import failing
from safetensors.torch import load_file
from small_checkpoints import small_config, write_small

from saccade.checkpoint import read
from saccade.checkpoint.open import JOURNAL, open_model
from saccade.convert.changes import Mode
from saccade.convert.convert import convert
from saccade.errors import CheckpointError, ContentsError, ConvertError

BF16, FP8 = Mode("bf16"), Mode("fp8")
SHARD = "model-0000{}-of-00003.safetensors"


@pytest.mark.parametrize(("call", "at"), [("pwrite", 2), ("pwrite", 40), ("fsync", 3), ("fsync", 5), ("replace", 6)])
def test_a_disk_that_fills_up_leaves_a_beginning_to_go_on_from(
    call: str, at: int, fp8_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bf16_digest: dict[str, str]
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing(getattr(os, call), at, errno.ENOSPC))
        with pytest.raises(ConvertError, match="No space left on device; .* run the same command again") as error:
            convert(fp8_model, out, BF16, threads=2)
    assert "\n" not in str(error.value)
    assert is_refused(out) and (out / JOURNAL).exists()
    with pytest.raises(CheckpointError, match="unfinished conversion; the same saccade convert command goes on"):
        open_model(out)
    if (out / SHARD.format(1)).exists():
        with pytest.raises(CheckpointError, match=f"is in {out}, which holds an unfinished conversion; the same"):
            open_model(out / SHARD.format(1))
    assert not list(out.glob(".*.part"))  # the disk is full: what is of no use goes
    convert(fp8_model, out, BF16)
    assert digest(out) == bf16_digest


def test_a_real_limit_of_the_system_is_one_line(fp8_model: Path, tmp_path: Path) -> None:
    program = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20));"
        "from saccade.cli.app import main; sys.argv[0] = 'saccade'; main()"
    )
    command = [sys.executable, "-c", program, "convert", str(fp8_model), str(tmp_path / "out"), "--bf16"]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 2 and ran.stdout == ""
    assert len(ran.stderr.splitlines()) == 2 and "File too large; what is finished stays" in ran.stderr
    assert is_refused(tmp_path / "out")


def at_read(monkeypatch: pytest.MonkeyPatch, count: int, act: Callable[[], None]) -> None:
    """Do something to the source at the `count`-th read."""
    left, before = [count], read.Reader.read

    def watched(self: read.Reader, span: read.FileSpan) -> None:
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
    fp8_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    bf16_digest: dict[str, str],
) -> None:
    path, out = fp8_model / SHARD.format(3), tmp_path / "out"
    content = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("saccade.inspect.contents.judge_scales", lambda *_: [])  # which reads, too, before anything else
        at_read(patch, 3, lambda: act(path))
        with pytest.raises(ConvertError, match=rf"{path.name}.*{words}.*run the same command again") as error:
            convert(fp8_model, out, BF16, threads=1)
    assert "\n" not in str(error.value) and is_refused(out)
    path.write_bytes(content)
    convert(fp8_model, out, BF16)
    assert digest(out) == bf16_digest


def test_a_source_that_changes_meanwhile_is_noticed(
    fp8_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = fp8_model / SHARD.format(2)

    def retrain() -> None:
        content = bytearray(path.read_bytes())
        content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
        path.write_bytes(content)

    at_read(monkeypatch, 5, retrain)
    with pytest.raises(ConvertError, match="changed while it was read"):
        convert(fp8_model, tmp_path / "out", BF16, threads=1)
    assert is_refused(tmp_path / "out")


def test_numbers_without_an_encoding_are_named(tmp_path: Path, fp8_model: Path) -> None:
    convert(fp8_model, tmp_path / "plain", BF16)
    name = "model.layers.2.self_attn.o_proj.weight"
    from safetensors.torch import save_file

    for file in (tmp_path / "plain").glob("*.safetensors"):
        found = load_file(file)
        if name in found:
            found[name][200, 3] = float("nan")
            save_file(found, file, metadata={"format": "pt"})
    with pytest.raises(ConvertError, match=f"{name}: a matrix with NaN or infinity") as error:
        convert(tmp_path / "plain", tmp_path / "out", FP8)
    assert "rows" in str(error.value) and is_refused(tmp_path / "out")


def test_numbers_beyond_bf16_are_named(tmp_path: Path, fp8_tensors: dict[str, torch.Tensor]) -> None:
    """An F32 matrix may hold what BF16, in which the model has it, cannot."""
    name = "model.layers.2.self_attn.indexer.weights_proj.weight"
    wide = fp8_tensors[name].float()
    wide[3, 7] = 3.4e38
    root = write_small(tmp_path / "m", small_config(), fp8_tensors | {name: wide})
    with pytest.raises(ContentsError, match=f"{name}: exceeds the range of BF16 .rows 0 to 16"):
        convert(root, tmp_path / "out", BF16)
    assert is_refused(tmp_path / "out")
