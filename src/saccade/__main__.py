"""`python -m saccade` and `saccade`: the command line, from its first import on.

Nothing is imported up here that takes time, so that Ctrl-C while modules load is one line as well. Next: cli.py.
"""

import signal
import sys
from types import FrameType


def main() -> None:
    """Entry point of the `saccade` command. Ends the process with the command's exit code."""
    interrupted = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        interrupted = True
        raise KeyboardInterrupt

    code = 0
    try:
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not so in the background of a shell
            signal.signal(signal.SIGINT, interrupt)
        from saccade.cli import main as run

        run()
    except SystemExit as end:
        code = end.code  # type: ignore[assignment]
    except BaseException as error:  # in the parsing of options, or while modules are imported
        code = end_early(KeyboardInterrupt() if interrupted else error)
    finally:
        if signal.getsignal(signal.SIGINT) is interrupt:  # what is left needs no words: the system's way is silent
            signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(code)


def end_early(error: BaseException) -> int:
    """Say how it ends where no command has begun; the exit code."""
    if isinstance(error, KeyboardInterrupt):  # perhaps in the import of what would say it
        print("saccade: interrupted", file=sys.stderr)
        return 130
    if "--debug" in sys.argv:
        import traceback

        traceback.print_exception(error)
    from saccade.terminal import find_end, say

    text, code = find_end(error, 2)
    say(text)
    return code


if __name__ == "__main__":
    main()
