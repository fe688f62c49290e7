"""Where a result cannot go is told before the work, and a result that cannot be written leaves what was there."""

import os
import stat
from pathlib import Path

import pytest
from commands import Run

from saccade.base.result_file import require_place, write_result
from saccade.errors import RequestError


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("", "an empty name"),
        ("-", "standard output; ./- is a file of that name"),
        (".", "a directory"),
        ("none/x", "no such directory"),
        ("\x1b/x", "no such directory: \\x1b/x"),
        ("text", "the file of --read, which would be lost"),
        ("./text", "the file of --read, which would be lost"),
        ("hard", "the file of --read, which would be lost"),
        ("soft", "the file of --read, which would be lost"),
        ("both", "the file of --writes, which would be lost"),
    ],
)
def test_a_place_where_no_result_can_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, found: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text").write_text("kept")
    os.link("text", "hard")
    os.symlink("text", "soft")
    with pytest.raises(RequestError, match="^--out: expected a file to write to, found ") as told:
        require_place("--out", name, {"--none": None, "--input": "-", "--read": "text", "--writes": "both"})
    assert found in str(told.value) and str(told.value).isprintable() and Path("text").read_text() == "kept"
    require_place("--out", "./-", {"--read": "text"})
    require_place("--out", "/dev/null", {"--read": "/dev/null"})


def test_no_right_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # who runs tests may be root
    with pytest.raises(RequestError, match="found no right to write: "):
        require_place("--out", str(tmp_path / "x"))


def test_a_text_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, link = tmp_path / "old", tmp_path / "link"
    old.write_text("old")
    old.chmod(0o600)
    link.symlink_to(old)
    write_result("--out", str(link), "new\u2028")
    assert link.is_symlink() and old.read_text("utf-8") == "new\u2028" and stat.S_IMODE(old.stat().st_mode) == 0o600
    for path in (old, tmp_path / "other", Path("/dev/full")):
        with monkeypatch.context() as patch:
            if path != Path("/dev/full"):
                patch.setattr(Path, "write_text", fill_disk)
            with pytest.raises(RequestError, match=f"^--out: {path} cannot be written: No space left on device$"):
                write_result("--out", str(path), "lost" * 9999)
    assert sorted(tmp_path.iterdir()) == [link, old] and old.read_text("utf-8") == "new\u2028"


def fill_disk(path: Path, text: str, encoding: str) -> None:
    """As a disk that becomes full: a part is there."""
    path.write_bytes(text.encode(encoding)[:4096])
    raise OSError(28, "No space left on device")


def test_a_file_in_a_folder_without_rights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x").write_text("old")
    monkeypatch.setattr(Path, "touch", refuse_touch)
    write_result("--out", str(tmp_path / "x"), "new")
    assert (tmp_path / "x").read_text() == "new"


def refuse_touch(path: Path, exist_ok: bool) -> None:
    raise PermissionError(13, "Permission denied")


LOSING = {  # a command line that would write over what it reads, and the option that names it
    "look --prompt-file text --out text": "--prompt-file",
    "look --selections text --out ./text": "--selections",
    "compare --server http://127.0.0.1:9 --prompts text --record text": "--prompts",
    "generate --input text --output text": "--input",
    "generate --input text --selections text": "--input",
    "generate --prompt-file text --selections text": "--prompt-file",
    "generate --input text --output other --selections other": "--output",
}


@pytest.mark.parametrize("line", LOSING)
def test_no_command_writes_over_what_it_reads(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text").write_text('{"prompt": "a"}\n')
    ran = run(*line.split())
    assert (ran.code, ran.out) == (2, "") and f"found the file of {LOSING[line]}, which would be lost" in ran.err
    assert ran.err.count("\n") == 1 and Path("text").read_text() == '{"prompt": "a"}\n' and not Path("other").exists()


@pytest.mark.parametrize(
    ("line", "option"),
    [
        ("look --prompt a --out -", "--out"),
        ("generate --prompt a --selections -", "--selections"),
        ("compare a b --record -", "--record"),
        ("compare a b --record none/x", "--record"),
        ("bench prefill --device cpu --shape bundled --out -", "--out"),
        ("bench decode --device cpu --shape bundled --plot -", "--plot"),
        ("bench prefill --device cpu --shape bundled --record-experts -", "--record-experts"),
    ],
)
def test_a_result_without_a_place_is_refused_before_the_work(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, option: str
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = run(*line.split())
    assert (ran.code, ran.out) == (2, "") and list(tmp_path.iterdir()) == []
    assert ran.err.startswith(f"saccade: {option}: expected a file to write to, found ") and ran.err.count("\n") == 1


IDLE = {
    "look --prompt a --request 1": "look: --request does nothing without --selections",
    "look --selections x --max-tokens 5": "look: --max-tokens does nothing with --selections",
    "look --selections x --index-cache fp8": "look: --index-cache does nothing with --selections",
    "look --selections x --device cpu": "look: --device does nothing with --selections",
    "compare a b --api-key k": "compare: --api-key does nothing without --server",
    "compare --replay x --served-model m": "compare: --served-model does nothing without --server",
    "compare --replay x --max-tokens 9": "compare: --max-tokens does nothing with --replay",
    "plan --diff x --full": "plan: --full does nothing with --diff",
    "plan --diff x --index-cache fp8": "plan: --index-cache does nothing with --diff",
    "check --threads 3": "check: --threads does nothing without --contents or --sha256",
}


@pytest.mark.parametrize("line", IDLE)
def test_an_option_that_would_do_nothing_is_refused(run: Run, line: str) -> None:
    ran = run(*line.split())
    assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1) and ran.err.startswith(f"saccade: {IDLE[line]}")
