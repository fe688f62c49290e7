"""`python -m saccade.bench decode ...`: the benchmarks of a device, where typer is not installed.

Options and work are those of `saccade bench`: both come from one table. Next: commands.py.
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any, NoReturn

from saccade.base.values import show
from saccade.bench.commands import BENCH_COMMANDS, run_command
from saccade.bench.options import Option
from saccade.errors import SaccadeError

NUMBER_WORDS = {int: "an integer", float: "a number"}


class Parser(argparse.ArgumentParser):
    """One that says in one line what is wrong."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see `{self.prog} --help`\n")


def print_line(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m saccade.bench", description="Measure the engine on a device.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    for command in BENCH_COMMANDS:
        one = commands.add_parser(command.name, help=command.help, description=command.help, allow_abbrev=False)
        for option in command.options:
            add_option(one, option)
        one.add_argument("--json", action="store_true", dest="as_json", help="Print the records instead of the table.")
    return parser


def add_option(parser: argparse.ArgumentParser, option: Option) -> None:
    text = option.help.replace("%", "%%")
    if option.value_type is bool:
        parser.add_argument(option.flag, action="store_true", help=text)
    else:
        text += "" if option.default is None else f" [default: {option.default}]"
        how = {"type": partial(read_typed, option.value_type), "default": option.default, "metavar": option.metavar}
        parser.add_argument(option.flag, help=text, **how)


def read_typed(kind: type, text: str) -> Any:
    """What was typed, as str, int or float."""
    try:
        return kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected {NUMBER_WORDS[kind]}, found {show(text)}") from None


def main(arguments: Sequence[str]) -> int:
    asked = vars(make_parser().parse_args(arguments))
    name, as_json = asked.pop("command"), asked.pop("as_json")
    try:
        run_command(name, asked, as_json, print_line)
    except (SaccadeError, OSError) as error:
        print_line(f"saccade: {error}")
        return 2
    except KeyboardInterrupt:
        print_line("saccade: interrupted")
        return 130  # 128 + SIGINT
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
