"""The boundary between exceptions and people: whatever a command raises is one line, an exit code, and no traceback."""

import io
import subprocess
import sys
import time

import pytest
import torch
from commands import Run
from typer.main import get_command

from saccade.cli import terminal
from saccade.cli.app import app
from saccade.cli.terminal import BUG, find_end, say
from saccade.errors import CheckpointError, ContentsError


def raised(error: BaseException) -> BaseException:
    try:
        raise error
    except BaseException as e:
        return e


def chained() -> BaseException:
    """What a C extension makes of Ctrl-C during its import."""
    try:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise ImportError("numpy failed to import")  # noqa: B904
    except ImportError as e:
        return e


ENDS: dict[str, tuple[BaseException, int, str]] = {
    "ours": (CheckpointError("x: no such directory"), 2, "saccade: x: no such directory"),
    "numbers": (ContentsError("x: a scale is NaN"), 1, "saccade: x: a scale is NaN"),
    "interrupt": (KeyboardInterrupt(), 130, "saccade: interrupted"),
    "interrupt with words": (KeyboardInterrupt("out: go on"), 130, "saccade: out: go on"),
    "interrupted import": (chained(), 130, "saccade: interrupted"),
    "reader gone": (BrokenPipeError(32, "Broken pipe"), 141, ""),
    "memory": (MemoryError(), 2, "saccade: the system refuses memory"),
    "memory of a device": (torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB"), 2, "saccade: the system refuses memory (CUDA out of memory)"),
    "memory of the system": (OSError(12, "Cannot allocate memory"), 2, "saccade: the system refuses memory"),
    "memory of a thread": (RuntimeError("can't start new thread"), 2, "saccade: the system refuses memory"),
    "system": (OSError(28, "No space left on device"), 2, "saccade: [Errno 28] No space left on device"),
    "package": (ModuleNotFoundError("No module", name="tokenizers"), 2, "saccade: this command needs the package tokenizers, which is not installed; `pip install 'saccade[run]'`"),
    "our own module": (ModuleNotFoundError("No module", name="saccade.x"), BUG, "saccade: a bug of Saccade"),
    "bug": (raised(ZeroDivisionError("a\nb")), BUG, "saccade: a bug of Saccade, please report it with what --debug prints: ZeroDivisionError: a b (test_terminal.py:"),
    "recursion": (RecursionError(), BUG, "saccade: a bug of Saccade"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ENDS)
def test_every_exception_is_one_line_and_a_code(
    run: Run, kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error, code, text = ENDS[kind]
    end = find_end(error, 2)
    assert (end.code, end.text[: len(text)]) == (code, text) and "\n" not in end.text

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("saccade.cli.app.plan_of", fail)
    ran = run("check")
    assert (ran.code, ran.out) == (code, "") and ran.err.startswith(text) and "Traceback" not in ran.err
    assert ran.err.count("\n") == bool(text)
    ran = run("check", "--debug")
    assert ran.code == code and "Traceback" in ran.err and text in ran.err


def test_every_command_has_debug() -> None:
    """--debug is added where errors end, so a command without it has no boundary either."""
    group = get_command(app)
    commands = dict(group.commands)  # type: ignore[attr-defined]
    commands |= {f"bench {name}": command for name, command in commands.pop("bench").commands.items()}
    assert len(commands) > 10
    for name, command in commands.items():
        assert any("--debug" in option.opts for option in command.params), name


def test_what_could_steer_a_terminal_is_spelled_out(capsys: pytest.CaptureFixture[str]) -> None:
    say("café 模型\n\x1b[31m\u202e\rx\udcff")
    assert capsys.readouterr().err == "café 模型\n\\x1b[31m\\u202e\\rx\\udcff\n"


STOPPED = """
import signal, sys
class Stop:
    def find_spec(self, name, *_):
        if name == {module!r}:
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Stop())
sys.argv = ["saccade", *sys.argv[1:]]
from saccade.__main__ import main
main()
"""


@pytest.mark.parametrize("module", ["saccade.cli.app", "typer", "saccade.checkpoint.index", "torch"])
def test_ctrl_c_while_modules_are_imported_is_one_line(module: str) -> None:
    line = [sys.executable, "-c", STOPPED.format(module=module), "score", "--tokens", "1,2"]
    ran = subprocess.run(line, capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stdout, ran.stderr) == (130, "", "saccade: interrupted\n")


def test_a_fault_before_any_command_is_one_line() -> None:
    program = STOPPED.format(module="none").replace("sys.argv =", "sys.modules['saccade.cli.app'] = None\nsys.argv =")
    ran = subprocess.run([sys.executable, "-c", program, "check"], capture_output=True, text=True, timeout=60)
    assert ran.returncode == BUG and ran.stderr.startswith("saccade: a bug of Saccade") and ran.stderr.count("\n") == 1
    ran = subprocess.run(
        [sys.executable, "-c", program, "check", "--debug"], capture_output=True, text=True, timeout=60
    )
    assert ran.returncode == BUG and "Traceback" in ran.stderr


def draw_bars() -> None:
    """Both bars, until the second has been drawn or, in a pipe, would have been."""
    with terminal.progress_bar("loading") as bar:
        bar(1, 2)
    with terminal.watched("reading", lambda: (3, 8), "tokens"):
        deadline = time.monotonic() + 5
        while terminal.has_terminal() and time.monotonic() < deadline and not sys.stderr.is_drawn():  # type: ignore[union-attr]
            time.sleep(0.01)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def is_drawn(self) -> bool:
        return "3/8" in self.getvalue()


def test_bars_are_drawn_on_a_terminal_and_never_in_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "BAR_PATIENCE", 0.0)
    for name, value in {"FORCE_COLOR": "1", "TTY_COMPATIBLE": "1", "TERM": "xterm"}.items():
        monkeypatch.setenv(name, value)  # what rich takes for a terminal
    monkeypatch.setattr(sys, "stderr", pipe := io.StringIO())
    draw_bars()
    assert pipe.getvalue() == ""
    monkeypatch.setattr(sys, "stderr", watched := Terminal())
    draw_bars()
    assert "loading" in watched.getvalue() and "reading" in watched.getvalue() and "3/8" in watched.getvalue()
    monkeypatch.setattr(sys, "stderr", None)
    draw_bars()
