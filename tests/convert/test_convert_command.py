"""`saccade convert`: what the command prints, its exit codes, and what Ctrl-C leaves."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import Run
from killed_conversions import digest, is_refused
from small_checkpoints import small_config, write_small

from saccade.checkpoint.open import JOURNAL
from saccade.convert import target
from saccade.convert.changes import Mode
from saccade.convert.convert import convert


def test_the_command_converts_and_says_what_it_did(fp8_model: Path, tmp_path: Path, run: Run) -> None:
    code, out, err = run("convert", fp8_model, tmp_path / "a", "--upcast", "indexer.wk", "--threads", "2")
    told = "saccade: 2 of 3 files with tensors to change, 5.11 MB to write; 1 unchanged"
    assert code == 0 and err.startswith(told) and len(err.splitlines()) == 1  # no progress bar: there is no terminal
    assert out.startswith(f"{tmp_path / 'a'}: complete, --upcast indexer.wk of {fp8_model}\n")
    assert "FP8 128x128 -> BF16    4 tensors" in out and "every number is the same as before, bit for bit" in out
    assert run("check", tmp_path / "a")[0] == 0
    code, out, _ = run("convert", fp8_model, tmp_path / "b", "--bf16", "--json", "--threads", "1")
    told = json.loads(out)
    assert told["mode"] == "--bf16" and told["threads"] == 1 and told["roundings"] == {}
    assert told["size"] == sum(p.stat().st_size for p in (tmp_path / "b").glob("*.safetensors"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "expected one of --upcast MODULE, --bf16 and --fp8, found none of them"),
        (["--bf16", "--fp8"], "found --bf16 and --fp8"),
        (["--upcast", ""], "expected a module's name or its end"),
        (["--bf16", "--threads", "0"], "threads: expected an integer of at least 1 and at most 1024, found 0"),
        (["--fp8"], "convert it with --bf16 first"),
    ],
)
def test_the_command_refuses_in_one_line(
    options: list[str], words: str, fp8_model: Path, tmp_path: Path, run: Run
) -> None:
    code, out, err = run("convert", fp8_model, tmp_path / "out", *options)
    assert code == 2 and out == "" and len(err.splitlines()) == 1 and words in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("model_type", "words"),
    [
        ("hy_v4", '"hy_v4", an architecture that is not implemented; '),
        (None, "null; "),
    ],
)
def test_a_model_that_is_not_known_is_refused_by_its_type(
    model_type: str | None, words: str, fp8_model: Path, tmp_path: Path, run: Run
) -> None:
    (fp8_model / "config.json").write_text(json.dumps(small_config(model_type=model_type)))
    code, _, err = run("convert", fp8_model, tmp_path / "out", "--bf16")
    assert code == 2 and len(err.splitlines()) == 1 and not (tmp_path / "out").exists()
    assert f"config.json: model_type is {words}supported: deepseek_v32, glm_moe_dsa" in err


INTERRUPTED = """
import os, signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs do not hear it
write, calls = os.pwrite, []
def pwrite(*args):
    calls.append(args)
    if len(calls) == 60:
        os.kill(os.getpid(), signal.SIGINT)
    return write(*args)
os.pwrite = pwrite
from saccade.cli.app import main
main()
"""


def test_ctrl_c_is_one_line_that_says_how_to_go_on(
    fp8_model: Path, tmp_path: Path, bf16_digest: dict[str, str]
) -> None:
    out = tmp_path / "out"
    arguments = ["convert", str(fp8_model), str(out), "--bf16", "--threads", "2"]
    ran = subprocess.run([sys.executable, "-c", INTERRUPTED, *arguments], capture_output=True, text=True, timeout=60)
    text = "interrupted; what is finished stays: run the same command again to go on"
    told = "saccade: 3 of 3 files with tensors to change, 16.9 MB to write\n"
    assert (ran.returncode, ran.stdout, ran.stderr) == (130, "", f"{told}saccade: {out}: {text}\n")
    assert (out / JOURNAL).exists() and is_refused(out) and not list(out.glob(".*.part"))
    convert(fp8_model, out, Mode("bf16"))
    assert digest(out) == bf16_digest


def test_ctrl_c_before_the_beginning_says_that_nothing_was_written(
    fp8_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(target, "require_space", interrupt)
    code, out, err = run("convert", fp8_model, tmp_path / "out", "--bf16")
    assert (code, out, err) == (130, "", f"saccade: {tmp_path / 'out'}: interrupted; nothing was written\n")
    assert not (tmp_path / "out").exists()


def test_unsound_scales_are_the_checkpoints_fault(
    tmp_path: Path, fp8_tensors: dict[str, torch.Tensor], run: Run
) -> None:
    name = "model.layers.1.self_attn.indexer.wk.weight_scale_inv"
    broken = fp8_tensors[name].clone()
    broken[0, 1] = -broken[0, 1]
    root = write_small(tmp_path / "m", small_config(), fp8_tensors | {name: broken})
    code, out, err = run("convert", root, tmp_path / "out", "--bf16")
    assert (code, out) == (1, "") and not (tmp_path / "out").exists()
    assert err.splitlines()[1] == f"bad-scale: {name} negative scales: 1, first at [0, 1]"


@pytest.mark.parametrize("command", ["load", "check"])
def test_help_of_a_benchmark_says_one_thing_about_its_model(command: str, run: Run) -> None:
    code, out, _ = run("bench", command, "--help")
    text = " ".join(out.split())
    assert code == 0 and text.count("synthetic FP8 checkpoint") == 1 and "bundled" not in text
