"""How a command ends and what it says besides its result: errors as one text, a progress bar, notes on stderr.

The one boundary between exceptions and people: whatever a command raises leaves here as one line and an exit code, and
its traceback is printed for --debug only. Knows no model and no command. Next: app.py.
"""

import contextlib
import functools
import inspect
import io
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Annotated, Any, NamedTuple

import typer

from saccade.base.json_text import to_json
from saccade.base.memory import find_said, is_refusal
from saccade.base.printable import escape_lines
from saccade.cli.interrupt import CODE, handled, last_words, raise_once
from saccade.errors import ContentsError, NoAnswerError, SaccadeError, explain_missing
from saccade.parallel.place import is_other_rank

BAR_PATIENCE = 1.0  # seconds after which a bar is worth its place
RANK_PATIENCE = 2.0  # seconds: torchrun ends rank 0 soon after another rank, before it could say why
NO_READER = 141  # 128 + SIGPIPE
BUG = 70  # EX_SOFTWARE of sysexits.h, "an internal software error"; 1 and 2 say that the input is at fault

Debug = Annotated[bool, typer.Option("--debug", help="Print the traceback of an error.")]


class End(NamedTuple):
    """How a command ends that an exception ended."""

    text: str  # one line for stderr, or several if a SaccadeError has several; "" for none
    code: int


def find_end(error: BaseException, code: int) -> End:
    """What to say of an exception. `code` is for what the user can mend; 1 says that the checkpoint's numbers are
    wrong, BUG that it is a bug of ours."""
    if stop := find_interrupt(error):
        error = stop
    if isinstance(error, SaccadeError):
        return End(f"saccade: {error}", 1 if isinstance(error, ContentsError | NoAnswerError) else code)
    if isinstance(error, KeyboardInterrupt):
        return End(f"saccade: {error.args[0] if error.args else 'interrupted'}", CODE)
    if isinstance(error, BrokenPipeError):  # a reader that went away (`| head`) wants to hear nothing
        return End("", NO_READER)
    if is_refusal(error):
        text = f"saccade: the system refuses memory ({find_said(error)}); free some, raise `ulimit -v`, or ask for less"
        return End(text, code)
    if isinstance(error, OSError):
        return End(f"saccade: {join_lines(str(error) or type(error).__name__)}", code)
    if isinstance(error, ModuleNotFoundError) and isinstance(
        missing := explain_missing(error, "this command"), SaccadeError
    ):
        return End(f"saccade: {missing}", code)
    place = traceback.extract_tb(error.__traceback__)[-1:]
    where = f" ({os.path.basename(place[0].filename)}:{place[0].lineno})" if place else ""
    what = join_lines(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)[:300]
    return End(f"saccade: a bug of Saccade, please report it with what --debug prints: {what}{where}", BUG)


def reports(code: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a command end as a command should: whatever it raises becomes the text and the exit code of `find_end`, and
    its traceback is printed if --debug is given, an option that this adds."""

    def wrap(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(*args: Any, debug: bool = False, **kwargs: Any) -> None:
            try:
                with handled(raise_once):
                    run_and_flush(functools.partial(command, *args, **kwargs))
            except (typer.Exit, typer.Abort, typer.BadParameter):  # typer's own ways to end
                raise
            except (Exception, KeyboardInterrupt) as error:
                if debug:
                    say(traceback.format_exc().rstrip())
                text, status = find_end(error, code)
                if isinstance(error, OSError):
                    drop_stdout()
                with last_words(status):
                    if is_other_rank(os.environ):
                        time.sleep(RANK_PATIENCE)
                    elif text:
                        say(text)
                    if kwargs.get("as_json") and text and not is_other_rank(os.environ):
                        show_refusal(error, text, status)
                raise typer.Exit(status) from None

        signature = inspect.signature(command, eval_str=True)
        option = inspect.Parameter("debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Debug)
        run.__signature__ = signature.replace(parameters=[*signature.parameters.values(), option])  # type: ignore[attr-defined]
        run.__annotations__ = command.__annotations__ | {"debug": Debug}
        del run.__wrapped__  # typer would look for annotations there
        return run

    return wrap


def show_refusal(error: BaseException, text: str, code: int) -> None:
    """An error as one JSON object on stdout, for who asked for --json: they read no stderr. Keys: error {kind, message,
    problems (of a plan: kind, name and text of each)}, exit_code."""
    found: dict[str, Any] = {"kind": type(error).__name__, "message": text.removeprefix("saccade: ")}
    problems = getattr(error, "problems", ())
    if problems:
        found["problems"] = [p._asdict() for p in problems]
    with contextlib.suppress(OSError, ValueError, AttributeError):  # what cannot be written is said on stderr already
        print(to_json({"error": found, "exit_code": code}), flush=True)


def find_interrupt(error: BaseException | None) -> KeyboardInterrupt | None:
    """The Ctrl-C behind an exception: modules that it stops in their import may raise something else for it."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        if isinstance(error, KeyboardInterrupt):
            return error
        seen.append(error)
        error = error.__cause__ or error.__context__
    return None


def join_lines(text: str) -> str:
    return " ".join(text.split())


def run_and_flush(command: Callable[[], None]) -> None:
    """Run a command and write out what it printed, however it ends: on a full disk, it is the flush that fails."""
    if sys.stdout is None:  # what `>&-` leaves; print would then do nothing, without a word
        raise OSError("standard output is closed")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # "?" for a letter that an ASCII terminal cannot show
    try:
        command()
    except typer.Exit:
        flush_stdout()
        raise
    flush_stdout()


@contextlib.contextmanager
def named_stdout() -> Iterator[None]:
    """Inside, an error of standard output says whose it is. That a reader went away stays what it is."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OSError(f"standard output cannot be written: {error.strerror or error}") from error


def flush_stdout() -> None:
    with named_stdout():
        sys.stdout.flush()


def drop_stdout() -> None:
    """Let what could not be written go nowhere, or the interpreter's own flush at exit fails aloud."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # nothing there, or no real file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def tell(text: str) -> None:
    """A result on stdout. As `say`, it spells out what could steer a terminal, so that no name of a file can."""
    with named_stdout():
        print(escape_lines(text))


def show_answer(text: str) -> None:
    """A piece of a model's answer on stdout. Into a file or a pipe it goes as it is, for that is what was asked for; on
    a terminal nothing in it is obeyed."""
    with named_stdout():
        print(escape_lines(text) if sys.stdout.isatty() else text, end="", flush=True)


def say(text: str) -> None:
    """A line on stderr, if there is one: without it, print would take stdout. Names and texts of files are in it, so
    that what could steer a terminal (escape sequences) is spelled out."""
    if sys.stderr is not None and not is_other_rank(os.environ):
        with contextlib.suppress(OSError):
            print(escape_lines(text), file=sys.stderr)


def has_terminal() -> bool:
    """Whether somebody watches stderr. rich would draw into a pipe where FORCE_COLOR is set, as CI systems do."""
    return sys.stderr is not None and sys.stderr.isatty()


@contextlib.contextmanager
def progress_bar(verb: str) -> Iterator[Callable[[int, int], None]]:
    """A function to tell the bytes done and the bytes in all, from any thread; on a terminal it draws a bar."""
    if not has_terminal():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (TextColumn(verb), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextlib.contextmanager
def watched(verb: str, poll: Callable[[], tuple[int, int]], noun: str) -> Iterator[None]:
    """On a terminal, a bar of what `poll` counts, done and in all, until the end; nothing for what takes no second."""
    if not has_terminal():
        yield
        return
    done = threading.Event()
    watcher = threading.Thread(target=draw_bar, args=(verb, poll, noun, done), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


def draw_bar(verb: str, poll: Callable[[], tuple[int, int]], noun: str, done: threading.Event) -> None:
    """The bar of `watched`, in a thread of its own: the work knows nothing of it."""
    if done.wait(BAR_PATIENCE):
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(verb), BarColumn(), MofNCompleteColumn(), TextColumn(noun), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, auto_refresh=False) as bar:
        task = bar.add_task("", total=None)
        while not done.wait(0.2):
            completed, total = poll()
            bar.update(task, completed=completed, total=total, refresh=True)
