"""What a new user meets first: help, version, completion, mistyped words, and Ctrl-C at any moment."""

import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
from commands import Run

from saccade import __version__
from saccade.base.near import count_edits, find_near

COMMANDS = ("check", "plan", "explain", "generate", "score", "eval", "convert", "bench", "bench load", "bench decode")


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_h_is_help_everywhere(run: Run, command: str) -> None:
    short, long = (run(*command.split(), option) for option in ("-h", "--help"))
    assert short == long and short.code == 0 and short.out.startswith(f"Usage: saccade {command}".rstrip())


def test_the_version_is_one_line_with_what_matters_beside_it(run: Run) -> None:
    ran = run("--version")
    assert ran.code == 0 and ran.err == ""
    assert ran.out.startswith(f"saccade {__version__}, Python 3.") and ", torch 2." in ran.out


MISTYPED = {  # command line -> what it says, between the command and the way to its help
    "chek": "saccade: no such command 'chek'; did you mean check?",
    "genrate": "saccade: no such command 'genrate'; did you mean generate?",
    "socre": "saccade: no such command 'socre'; did you mean score?",  # two letters swapped
    "frobnicate": "saccade: no such command 'frobnicate';",
    "download": "saccade: no such command 'download';",
    "bench lod": "saccade bench: no such command 'lod'; did you mean load?",
    "bench serve": "saccade bench: no such command 'serve';",
    "--verson": "saccade: no such option --verson; did you mean --version?",
    "plan --fulll": "saccade plan: no such option --fulll; did you mean --full?",
    "plan --rnak 1": "saccade plan: no such option --rnak; did you mean --rank?",
    "plan --temp 1": "saccade plan: no such option --temp;",  # difflib says: --tp, --help
    "generate --promt x": "saccade generate: no such option --promt; did you mean --prompt?",
    "generate --temp 1": "saccade generate: no such option --temp; did you mean --temperature?",
    "generate --color": "saccade generate: no such option --color;",
    "plan -x": "saccade plan: no such option -x;",
    "plan --rank x": "saccade plan: invalid value for '--rank': ",
    "plan --tp": "saccade: option '--tp' requires an argument;",
    "explain": "saccade explain: missing argument '[MODEL] PARAMETER';",
    "plan a b": "saccade plan: got unexpected extra argument",
    "plan --\x1b[31m": "saccade plan: no such option --\\x1b[31m;",
}


@pytest.mark.parametrize("line", MISTYPED)
def test_a_mistyped_command_line_is_one_line(run: Run, line: str) -> None:
    ran = run(*line.split(" "))
    assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1), ran.err
    assert ran.err.startswith(MISTYPED[line]) and ran.err.endswith("--help`\n"), ran.err
    assert ("did you mean" in ran.err) == ("did you mean" in MISTYPED[line])


def test_only_near_parameters_are_offered(run: Run) -> None:
    near = "model.layers.1.self_attn.o_proj"
    for name in ("model.layers.1.self_atn.o_proj", "model.layer.1.self_attn.o_prj", "layers.1.self_attn.o_proj"):
        assert run("explain", name).err.endswith(f"; did you mean {near}?\n"), name
    for name in ("model.layers.77.self_attn.o_proj", "wk", "model.layers.1.mlp", "model.layers.1.self_attn.u_port"):
        assert run("explain", name).err.endswith("; `saccade plan --full` lists them\n"), name


def test_edits_are_counted_as_by_definition() -> None:
    """Against all ways of a few edits, on words of two letters."""

    def edit(word: str) -> set[str]:
        n = len(word)
        made = {word[:i] + word[i + 1 :] for i in range(n)} | {
            word[:i] + c + word[i:] for i in range(n + 1) for c in "ab"
        }
        made |= {word[:i] + c + word[i + 1 :] for i in range(n) for c in "ab"}
        return made | {word[:i] + word[i + 1] + word[i] + word[i + 2 :] for i in range(n - 1)}

    words = ["".join(w) for n in range(5) for w in product("ab", repeat=n)]
    for word in words:
        one = edit(word) | {word}
        two = set().union(*map(edit, one))
        for other in words:
            expected = 0 if other == word else 1 if other in one else 2 if other in two else 3
            # A letter between two that were swapped is not counted as one edit more, as usual for this distance.
            assert count_edits(word, other, 2) in ({expected} if expected < 2 else {2, 3})
    assert find_near("abc", ["xyz"]) == [] == find_near("ab", ["abcdef"])
    assert find_near("check", [f"check{c}" for c in "abcd"]) == []  # four are no answer


@pytest.mark.parametrize("program", [["-m", "saccade"], [str(Path(sys.executable).with_name("saccade"))]])
def test_the_script_for_completion_is_of_the_installed_command(program: list[str]) -> None:
    line = [sys.executable, *program, "--show-completion"]
    environment = os.environ | {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    for shell in ("bash", "zsh", "fish"):
        ran = subprocess.run([*line, shell], capture_output=True, text=True, env=environment, timeout=60)
        assert (ran.returncode, ran.stderr) == (0, "") and "_SACCADE_COMPLETE=" in ran.stdout, ran
        assert "python" not in ran.stdout.lower()


def test_completion_knows_commands_and_options_and_loads_no_torch() -> None:
    program = "import sys; from saccade.__main__ import main\ntry: main()\nfinally: assert 'torch' not in sys.modules"
    for typed, expected in (("saccade pl", ["plan"]), ("saccade plan --ind", ["--index-cache"])):
        words = {"COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" ")), "_SACCADE_COMPLETE": "complete_bash"}
        line = [sys.executable, "-c", f"import sys; sys.argv[0] = 'saccade'\n{program}"]
        ran = subprocess.run(line, capture_output=True, text=True, env=os.environ | words, timeout=60)
        assert (ran.stdout.split(), ran.stderr) == (expected, ""), ran.stderr


INTERRUPT = """
import os, signal, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == {moment!r}:
            try:
                os.kill(os.getpid(), signal.SIGINT)
                sum(range(1000))
            except KeyboardInterrupt:
                raise ImportError("turned into another error, as C code does")

sys.meta_path.insert(0, Finder())
if {moment!r} == "exit":
    import atexit, threading
    atexit.register(lambda: os.kill(os.getpid(), signal.SIGINT))
sys.argv = ["saccade", *{line!r}]
from saccade.__main__ import main
main()
"""


@pytest.mark.parametrize(
    "moment, line, code",
    [
        ("typer", ["check"], 130),
        ("saccade.plan", ["check"], 130),
        ("torch", ["generate", "--prompt", "Tom"], 130),
        ("exit", ["check", "nowhere"], 2),  # the work is done: its own code, no traceback
    ],
)
def test_ctrl_c_at_any_moment_is_one_line(moment: str, line: list[str], code: int) -> None:
    program = INTERRUPT.format(moment=moment, line=line)
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    said = "saccade: interrupted\n" if code == 130 else ran.stderr
    assert (ran.returncode, ran.stdout, ran.stderr) == (code, "", said)
    assert ran.stderr.count("\n") == 1


@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_while_the_line_is_said_says_it_no_second_time(presses: int) -> None:
    program = f"""
import os, signal
from saccade.cli import terminal
from saccade.cli.interrupt import end_on_interrupt
def press(): os.kill(os.getpid(), signal.SIGINT); sum(range(1000))
def say(text, say=terminal.say):
    say(text)
    for _ in range({presses}): press()
    os.write(1, b"whole ")
terminal.say = say
end_on_interrupt()
try:
    terminal.reports(2)(press)()
finally:
    os.write(1, b"never")
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    out = "whole " if presses == 1 else ""
    assert (ran.returncode, ran.stdout, ran.stderr) == (130, out, "saccade: interrupted\n")


def test_the_second_ctrl_c_ends_at_once_and_an_ignored_one_stays_ignored() -> None:
    program = """
import os, signal
from saccade.cli.interrupt import end_on_interrupt, handled, raise_once
def press(): os.kill(os.getpid(), signal.SIGINT); sum(range(1000))
end_on_interrupt()
with handled(raise_once):
    try:
        press()
    except KeyboardInterrupt:
        print("in order", flush=True)
        press()
print("never")
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stdout, ran.stderr) == (130, "in order\n", "saccade: interrupted\n")
    ignored = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n" + program
    ran = subprocess.run([sys.executable, "-c", ignored], capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stdout) == (0, "never\n")
