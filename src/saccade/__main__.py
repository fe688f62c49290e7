"""`python -m saccade` and `saccade`: the command line, from its first import on.

Nothing is imported up here that takes time, so that Ctrl-C while modules load is one line as well. Next: cli/app.py.
"""

import sys

from saccade.cli import interrupt


def main() -> None:
    """Entry point of the `saccade` command. Ends the process with the command's exit code."""
    code: object = 0
    interrupt.end_on_interrupt()
    try:
        from saccade.cli.app import main as run

        run()
    except SystemExit as end:
        code = end.code
    except BaseException as error:  # in the parsing of options, or while modules are imported
        code = end_early(error)
    interrupt.end(code if isinstance(code, int) else 0)
    sys.exit(code)  # type: ignore[arg-type]


def end_early(error: BaseException) -> int:
    """Say how it ends where no command has begun; the exit code."""
    if isinstance(error, KeyboardInterrupt):  # perhaps in the import of what would say it
        with interrupt.last_words(130):
            print("saccade: interrupted", file=sys.stderr)
        return 130
    if "--debug" in sys.argv:
        import traceback

        traceback.print_exception(error)
    from saccade.cli.terminal import find_end, say

    text, code = find_end(error, 2)
    with interrupt.last_words(code):
        say(text)
    return code


if __name__ == "__main__":
    main()
