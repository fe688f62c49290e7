"""`saccade bench ...`: measurements that print their conditions. What is measured is in bench/, a file each."""

import json
from typing import Annotated, Any

import typer

from saccade.options import BUNDLED, AsJson, Model
from saccade.terminal import reports

bench = typer.Typer(help="Measure, and print under which conditions.", no_args_is_help=True, rich_markup_mode=None)


def print_measured(result: dict[str, Any], as_json: bool) -> None:
    """The figures of a measurement with its conditions, one a line."""
    if as_json:
        print(json.dumps(result))
        return
    for key, value in result.items():
        for line in value if isinstance(value, list) else [value]:
            print(f"{key:18} {line}")


@bench.command()
@reports(2)
def load(
    model: Model = BUNDLED,
    pairs: Annotated[int, typer.Option(help="Plain reads and loads, alternating.")] = 5,
    threads: Annotated[int, typer.Option(help="Threads that read.")] = 2,
    as_json: AsJson = False,
) -> None:
    """Time of a load against a plain sequential read of the same files, page cache warm. Without MODEL: a synthetic FP8
    checkpoint of 2.7 GB."""
    from saccade.bench.load import bench_load

    print_measured(bench_load(model or None, pairs, threads), as_json)


@bench.command(name="check")
@reports(2)
def bench_check(
    model: Model = BUNDLED,
    pairs: Annotated[int, typer.Option(help="Plain reads and checks, alternating.")] = 5,
    threads: Annotated[int, typer.Option(help="Threads that read.")] = 2,
    sha256: Annotated[str | None, typer.Option(metavar="FILE", help="Digests to compare in the same pass.")] = None,
    as_json: AsJson = False,
) -> None:
    """Time of `check --contents` against a plain sequential read of the same files, page cache warm. Without MODEL: a
    synthetic FP8 checkpoint of 2.7 GB."""
    from saccade.bench.check import bench_check as run

    print_measured(run(model or None, pairs, threads, sha256), as_json)


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
    from saccade.bench.convert import bench_convert as run

    print_measured(run(gigabytes, pairs, threads, folder), as_json)
