"""Answers to a mistyped command line: one line with the command, the fault and the nearest name.

Knows no command. Next: app.py.
"""

import sys
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperGroup

from saccade.base.near import ask, find_near
from saccade.base.printable import escape
from saccade.base.values import show
from saccade.cli.terminal import say, show_refusal
from saccade.errors import SaccadeError

UsageError: Any = typer.BadParameter.__mro__[1]  # click's own, or of typer's copy of click: newer versions have one

# Of pydantic's errors, by type.
PARSED = {
    "int_parsing": "expected an integer",
    "int_parsing_size": "expected an integer",
    "float_parsing": "expected a number",
}


class Commands(TyperGroup):
    """A group of commands whose usage errors are one line and exit code 2."""

    def main(self, *args: Any, **options: Any) -> Any:
        is_alone = options.get("standalone_mode", True)
        words = args[0] if args and args[0] is not None else options.get("args") or sys.argv
        try:
            code = super().main(*args, **(options | {"standalone_mode": False}))
        except SaccadeError as error:  # of an argument, before its command runs
            code = refuse(error, f"saccade: {error}", 2, words)
        except UsageError as error:
            if type(error).__name__ == "NoArgsIsHelpError":
                say(error.format_message())
                code = error.exit_code
            else:
                code = refuse(error, describe_usage(error), error.exit_code, words)
        except typer.Abort:
            code = 130
        if is_alone:
            sys.exit(code or 0)
        return code

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name = args[0]
        if name in self.commands or name.startswith("-") or ctx.resilient_parsing:
            return super().resolve_command(ctx, args)
        ctx.fail(f"no such command {name!r}{ask(find_near(name, self.commands))}")


def refuse(error: Exception, text: str, code: int, words: Sequence[str]) -> int:
    """Say why a line of `words` is refused, in JSON too if it asks for that; the exit code."""
    say(text)
    if "--json" in words:
        show_refusal(error, text, code)
    return code


def describe_value(error: Any) -> str:
    """A usage error's own text. Of a value that pydantic reads, typer tells what was expected, not what was found."""
    text = error.format_message().rstrip(".")
    read = getattr(error.__cause__, "errors", None)
    if read is None:
        return text
    first = read()[0]
    expected = PARSED.get(first["type"], first["msg"])
    return text.replace(error.message, f"{expected}, found {show(first['input'])}")


def describe_usage(error: Any) -> str:
    """A usage error as one line, with the command whose help says more."""
    path = error.ctx.command_path if error.ctx else "saccade"
    option = getattr(error, "option_name", None)
    if type(error).__name__ == "NoSuchOption" and option and error.ctx:
        known = [name for param in error.ctx.command.params for name in (*param.opts, *param.secondary_opts)]
        words = [name[2:] for name in (*known, "--help") if name.startswith("--")]
        near = find_near(option.lstrip("-"), words)
        text = f"no such option {option}{ask(f'--{word}' for word in near)}"
    else:
        text = describe_value(error)
        text = text[:1].lower() + text[1:]
    end = "" if text.endswith("?") else ";"
    line = " ".join(f"{path}: {text}{end} see `{path} --help`".split())
    return escape(line)
