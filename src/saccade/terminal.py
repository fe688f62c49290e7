"""How a command ends and what it says besides its result: errors as one text, a progress bar, notes on stderr.

Knows no model and no command. Next: cli.py.
"""

import contextlib
import functools
import io
import os
import sys
from collections.abc import Callable, Iterator
from typing import ParamSpec

import typer

from saccade.errors import ContentsError, SaccadeError

P = ParamSpec("P")


def reports(code: int) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Make a command end as a command should: SaccadeErrors, and what the system refuses (a full disk behind stdout),
    as one text and exit `code`, or 1 if it is the checkpoint's numbers that are wrong, Ctrl-C as a quiet 130, a reader
    that went away (`| head`) as a quiet 141, as SIGPIPE would."""

    def wrap(command: Callable[P, None]) -> Callable[P, None]:
        @functools.wraps(command)
        def run(*args: P.args, **kwargs: P.kwargs) -> None:
            try:
                run_and_flush(functools.partial(command, *args, **kwargs))
            except SaccadeError as error:
                say(f"saccade: {error}")
                raise typer.Exit(1 if isinstance(error, ContentsError) else code) from None
            except KeyboardInterrupt:
                raise typer.Exit(130) from None
            except BrokenPipeError:
                drop_stdout()
                raise typer.Exit(141) from None
            except OSError as error:
                drop_stdout()
                say(f"saccade: {error}")
                raise typer.Exit(code) from None

        return run

    return wrap


def run_and_flush(command: Callable[[], None]) -> None:
    """Run a command and write out what it printed, however it ends: on a full disk, it is the flush that fails."""
    if sys.stdout is None:  # what `>&-` leaves; print would then do nothing, without a word
        raise OSError("standard output is closed")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # "?" for a letter that an ASCII terminal cannot show
    try:
        command()
    except typer.Exit:
        sys.stdout.flush()
        raise
    sys.stdout.flush()


def drop_stdout() -> None:
    """Let what could not be written go nowhere, or the interpreter's own flush at exit fails aloud."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # nothing there, or no real file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def say(text: str) -> None:
    """A line on stderr, if there is one: without it, print would take stdout."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            print(text, file=sys.stderr)


@contextlib.contextmanager
def progress_bar(verb: str) -> Iterator[Callable[[int, int], None]]:
    """A function to tell the bytes done and the bytes in all, from any thread; on a terminal it draws a bar."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = (TextColumn(verb), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
