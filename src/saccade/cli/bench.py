"""`saccade bench ...`: measurements that print their conditions. What is measured is in bench/, a file each."""

from typing import Annotated, Any

import typer

from saccade.base.json_text import to_json
from saccade.bench.commands import BENCH_COMMANDS, BenchCommand, run_command
from saccade.bench.options import Option
from saccade.cli.options import (
    DEFAULT_MODEL,
    AsJson,
    CacheTokens,
    Device,
    Revision,
    Speculate,
    put_options,
    refuse_empty,
)
from saccade.cli.terminal import reports, say, tell
from saccade.cli.usage import Commands

Measured = Annotated[
    str,
    typer.Argument(
        help="Directory, .safetensors file or Hugging Face id. Default: a synthetic FP8 checkpoint of 2.7 GB.",
        callback=refuse_empty,
    ),
]
bench = typer.Typer(
    help="Measure, and print under which conditions.", cls=Commands, no_args_is_help=True, rich_markup_mode=None
)


def print_measured(result: dict[str, Any], as_json: bool) -> None:
    """The figures of a measurement with its conditions, one a line."""
    if as_json:
        tell(to_json(result))
        return
    for key, value in result.items():
        for line in value if isinstance(value, list) else [value]:
            tell(f"{key:18} {line}")


def find_files(model: str, revision: str | None) -> str | None:
    """Where the files of a model lie, fetched if it is an id; None where none is named."""
    from saccade.checkpoint.hub.fetch import fetch_checkpoint

    return str(fetch_checkpoint(model, revision, say)) if model else None


@bench.command()
@reports(2)
def load(
    model: Measured = DEFAULT_MODEL,
    pairs: Annotated[int, typer.Option(help="Plain reads and loads, alternating.")] = 5,
    threads: Annotated[int | None, typer.Option(help="Threads that read. Default: 2, for a GPU 4.")] = None,
    device: Device = "cpu",
    revision: Revision = None,
    as_json: AsJson = False,
) -> None:
    """Time of a load against a plain sequential read of the same files, page cache warm."""
    from saccade.bench.files.load import bench_load

    print_measured(bench_load(find_files(model, revision), pairs, threads, device), as_json)


@bench.command(name="check")
@reports(2)
def bench_check(
    model: Measured = DEFAULT_MODEL,
    pairs: Annotated[int, typer.Option(help="Plain reads and checks, alternating.")] = 5,
    threads: Annotated[int, typer.Option(help="Threads that read.")] = 2,
    sha256: Annotated[str | None, typer.Option(metavar="FILE", help="Digests to compare in the same pass.")] = None,
    revision: Revision = None,
    as_json: AsJson = False,
) -> None:
    """Time of `check --contents` against a plain sequential read of the same files, page cache warm."""
    from saccade.bench.files.check import bench_check as run

    print_measured(run(find_files(model, revision), pairs, threads, sha256), as_json)


@bench.command(name="convert")
@reports(2)
def bench_convert(
    gigabytes: Annotated[float, typer.Option(help="Size of the BF16 result.")] = 2.0,
    pairs: Annotated[int, typer.Option(help="Plain writes and conversions, alternating.")] = 5,
    threads: Annotated[int | None, typer.Option(help="Threads that convert. Default: up to 8.")] = None,
    folder: Annotated[str | None, typer.Option(help="Where to write. Default: the temporary directory.")] = None,
    as_json: AsJson = False,
) -> None:
    """`convert --bf16` of a synthetic FP8 checkpoint against a plain write of the result's bytes, page cache warm."""
    from saccade.bench.files.convert import bench_convert as run

    print_measured(run(gigabytes, pairs, threads, folder), as_json)


@bench.command(name="threads")
@reports(2)
def bench_threads(
    threads: Annotated[str, typer.Option(help="Numbers to compare, with commas; auto: as chosen.")] = "1,2,auto",
    busy: Annotated[int, typer.Option(help="Processes that compute beside.")] = 2,
    repeats: Annotated[int, typer.Option(help="Samples of each, alone and beside, alternating.")] = 3,
    task: Annotated[list[str] | None, typer.Option(help="prompt, eval or many; may be repeated. All.")] = None,
    limit: Annotated[float, typer.Option(help="Seconds after which a sample is ended.")] = 600.0,
    as_json: AsJson = False,
) -> None:
    """Time of the bundled model on a CPU, alone and beside busy processes, by the number of threads that compute."""
    from saccade.bench.threads import THREAD_TASKS, show_threads
    from saccade.bench.threads import bench_threads as run

    counts = [None if word == "auto" else int(word) if word.isdecimal() else 0 for word in threads.split(",")]
    found = run(counts, busy, repeats, task or tuple(THREAD_TASKS), limit, say)
    tell(to_json(found) if as_json else show_threads(found))


@bench.command(name="prefix")
@reports(2)
def bench_prefix(
    model: Annotated[
        str,
        typer.Argument(help="Directory or Hugging Face id. Default: the bundled checkpoint.", callback=refuse_empty),
    ] = DEFAULT_MODEL,
    shared: Annotated[int, typer.Option(help="Tokens that two prompts begin with.")] = 2000,
    new: Annotated[int, typer.Option(help="Tokens of each behind them.")] = 20,
    repeats: Annotated[int, typer.Option(help="Pairs of prompts.")] = 5,
    device: Device = "auto",
    speculate: Speculate = "0",
    as_json: AsJson = False,
) -> None:
    """Time to the first token behind a beginning that the prefix cache holds, against a new one."""
    from saccade.bench.steps.prefix import bench_prefix as run

    print_measured(run(model or None, shared, new, repeats, device, speculate, say), as_json)


@bench.command(name="sessions")
@reports(2)
def bench_sessions(
    model: Annotated[
        str,
        typer.Argument(help="Directory or Hugging Face id. Default: the bundled checkpoint.", callback=refuse_empty),
    ] = DEFAULT_MODEL,
    sessions: Annotated[str, typer.Option(help="How many take turns; several with commas.")] = "2,8",
    shared: Annotated[int, typer.Option(help="Tokens that all begin with.")] = 1000,
    own: Annotated[int, typer.Option(help="Tokens of each session behind them.")] = 500,
    new: Annotated[int, typer.Option(help="Tokens that a turn adds.")] = 150,
    answer: Annotated[int, typer.Option(help="Tokens of each answer.")] = 30,
    turns: Annotated[int, typer.Option(help="Of each session.")] = 6,
    cache_tokens: CacheTokens = None,
    device: Device = "auto",
    speculate: Speculate = "0",
    as_json: AsJson = False,
) -> None:
    """What the prefix cache finds of the prompts of agents that take turns and send their histories again."""
    from saccade.bench.options import parse_counts
    from saccade.bench.steps.sessions import bench_sessions as run

    how = (parse_counts("sessions", sessions), shared, own, new, answer, turns, cache_tokens, device, speculate, say)
    print_measured(run(model or None, *how), as_json)


def add_command(command: BenchCommand) -> None:
    """A benchmark of a device, as bench/commands.py describes it."""
    rows = {option.name: (annotate(option), option.default) for option in command.options}

    def run(asked: dict[str, Any], as_json: AsJson = False) -> None:
        run_command(command.name, asked, as_json, say)

    run.__doc__ = command.help
    bench.command(name=command.name)(reports(2)(put_options(run, "asked", rows, dict)))


def annotate(option: Option) -> Any:
    """An option in typer's words. The flag is spelled out, or typer adds --no-... to what is given or not."""
    kind: Any = option.value_type
    if option.default is None:
        kind |= None
    return Annotated[kind, typer.Option(option.flag, help=option.help, metavar=option.metavar)]


for each in BENCH_COMMANDS:
    add_command(each)
