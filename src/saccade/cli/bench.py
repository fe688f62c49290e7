"""`saccade bench ...`: measurements that print their conditions. What is measured is in bench/, a file each."""

from typing import Annotated, Any

import typer

from saccade.api.settings import BATCH_TOKENS
from saccade.base.json_text import to_json
from saccade.cli.options import (
    DEFAULT_MODEL,
    ActivationsOption,
    AsJson,
    CacheTokens,
    Device,
    Ep,
    Revision,
    Speculate,
    Tp,
    refuse_empty,
)
from saccade.cli.terminal import reports, say
from saccade.cli.usage import Commands

Measured = Annotated[
    str,
    typer.Argument(
        help="Directory, .safetensors file or Hugging Face id. Default: a synthetic FP8 checkpoint of 2.7 GB.",
        callback=refuse_empty,
    ),
]
ShapeOption = Annotated[str, typer.Option(help="v32, glm5, v32-rank-of-8, glm5-rank-of-8 or bundled.")]
Layers = Annotated[int | None, typer.Option(help="The first N layers only.")]
BatchOption = Annotated[str, typer.Option(help="Requests of a step; several with commas.")]
Context = Annotated[str, typer.Option(help="Tokens of a request; several with commas.")]
ArrangementOption = Annotated[
    str | None,
    typer.Option(help="packed[-fp8], fused, two-streams, separate[-fp8] or reference; several with commas."),
]
OnDevice = Annotated[str, typer.Option("--device", help='"auto" (cuda), "cuda:1" or, for small shapes, "cpu".')]
Repeats = Annotated[int, typer.Option(help="Samples.")]
Seed = Annotated[int, typer.Option(help="Of the synthetic weights.")]
Commit = Annotated[str | None, typer.Option(help="Of the sources, where there is no git.")]
Out = Annotated[str | None, typer.Option(metavar="FILE", help="Write the records there as JSON.")]

bench = typer.Typer(
    help="Measure, and print under which conditions.", cls=Commands, no_args_is_help=True, rich_markup_mode=None
)


def print_measured(result: dict[str, Any], as_json: bool) -> None:
    """The figures of a measurement with its conditions, one a line."""
    if as_json:
        print(to_json(result))
        return
    for key, value in result.items():
        for line in value if isinstance(value, list) else [value]:
            print(f"{key:18} {line}")


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
    print(to_json(found) if as_json else show_threads(found))


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
    from saccade.bench.record import parse_counts
    from saccade.bench.steps.sessions import bench_sessions as run

    how = (parse_counts("sessions", sessions), shared, own, new, answer, turns, cache_tokens, device, speculate, say)
    print_measured(run(model or None, *how), as_json)


def run_on_device(command: str, as_json: bool, **options: Any) -> None:
    """A benchmark of a device. `python -m saccade.bench` runs the same, without typer."""
    from argparse import Namespace

    from saccade.bench.commands import measure_command
    from saccade.bench.record import write_records

    records, show = measure_command(Namespace(command=command, **options), say)
    if options["out"]:
        write_records(options["out"], records)
    print(to_json(records) if as_json else show(records))


@bench.command(name="allreduce")
@reports(2)
def bench_allreduce(
    tp: Annotated[int, typer.Option(metavar="N", help="Ranks: a GPU each, or a process each with --device cpu.")] = 2,
    repeats: Repeats = 7,
    device: OnDevice = "auto",
    commit: Commit = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """What a sum over ranks takes, for messages of 14 KB to 128 MB: ours, NCCL, gloo."""
    run_on_device("allreduce", as_json, tp=tp, repeats=repeats, device=device, commit=commit, out=out)


@bench.command(name="decode")
@reports(2)
def bench_decode(
    shape: ShapeOption = "v32-rank-of-8",
    layers: Layers = None,
    batch: BatchOption = "1",
    context: Context = "8192",
    arrangement: ArrangementOption = None,
    steps: Annotated[int, typer.Option(help="Steps of a sample.")] = 20,
    repeats: Repeats = 7,
    random_cache: Annotated[bool, typer.Option("--random-cache", help="No prefill: caches of random rows.")] = False,
    index_cache: Annotated[str | None, typer.Option(help="How index keys are cached: bf16 or fp8.")] = None,
    experts: Annotated[str, typer.Option(help="router, or uniform: any as likely as any other.")] = "router",
    speculate: Annotated[
        str | None, typer.Option(metavar="K", help="Also steps with so many drafts; several with commas.")
    ] = None,
    plot: Annotated[str | None, typer.Option(metavar="FILE", help="Draw one layer's kernels as SVG.")] = None,
    tp: Tp = 1,
    ep: Ep = 1,
    device: OnDevice = "auto",
    seed: Seed = 0,
    commit: Commit = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Time per token of whole decode steps on synthetic weights, against the bytes that they must move."""
    run_on_device(
        "decode", as_json, shape=shape, layers=layers, batch=batch, context=context, arrangement=arrangement,
        steps=steps, repeats=repeats, random_cache=random_cache, index_cache=index_cache, experts=experts,
        speculate=speculate, plot=plot, tp=tp, ep=ep, device=device, seed=seed, commit=commit, out=out,
    )  # fmt: skip


@bench.command(name="prefill")
@reports(2)
def bench_prefill(
    shape: ShapeOption = "v32-rank-of-8",
    layers: Layers = None,
    context: Context = "8192",
    arrangement: ArrangementOption = None,
    chunk: Annotated[int, typer.Option(help="Tokens of a step.")] = BATCH_TOKENS["cuda"],
    activations: ActivationsOption = "exact",
    repeats: Repeats = 7,
    tp: Tp = 1,
    ep: Ep = 1,
    device: OnDevice = "auto",
    seed: Seed = 0,
    commit: Commit = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Time to the first token after a prompt, on synthetic weights."""
    run_on_device(
        "prefill", as_json, shape=shape, layers=layers, context=context, arrangement=arrangement, chunk=chunk,
        activations=activations, repeats=repeats, tp=tp, ep=ep, device=device, seed=seed, commit=commit, out=out,
    )  # fmt: skip


@bench.command(name="engine")
@reports(2)
def bench_engine(
    shape: ShapeOption = "bundled",
    layers: Layers = None,
    clients: Annotated[str, typer.Option(help="Requests in flight; several with commas.")] = "1,8,32,128",
    prompt: Annotated[int, typer.Option(help="Tokens of a request.")] = 64,
    output: Annotated[int, typer.Option(help="Tokens that follow.")] = 256,
    chunk: Annotated[int | None, typer.Option(help="Tokens of a step. Default: as LLM has it.")] = None,
    capture: Annotated[bool, typer.Option("--capture", help="Again with captured selections.")] = False,
    arrivals: Annotated[str, typer.Option(help="again: who is answered asks; or poisson: by chance.")] = "again",
    load: Annotated[float, typer.Option(help="poisson: requests a second, of those that again gets.")] = 0.8,
    ahead: Annotated[bool, typer.Option("--ahead", help="Launch a step before the last one is read.")] = False,
    mixed: Annotated[int, typer.Option(help="Capture steps with prompts up to so many tokens.")] = 16,
    device: OnDevice = "auto",
    seed: Seed = 0,
    commit: Commit = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Requests per second and time between tokens of an engine whose clients ask again and again."""
    run_on_device(
        "engine", as_json, shape=shape, layers=layers, clients=clients, prompt=prompt, output=output, chunk=chunk,
        capture=capture, arrivals=arrivals, load=load, ahead=ahead, mixed=mixed, device=device, seed=seed,
        commit=commit, out=out,
    )  # fmt: skip


@bench.command(name="chunks")
@reports(2)
def bench_chunks(
    shape: ShapeOption = "v32-rank-of-8",
    layers: Layers = None,
    chunk: Annotated[str, typer.Option(help="Tokens of a step; several with commas.")] = "64,256,1024,4096",
    decodes: Annotated[int, typer.Option(help="Requests beside.")] = 8,
    context: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 8192,
    repeats: Repeats = 3,
    device: OnDevice = "auto",
    seed: Seed = 0,
    commit: Commit = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """The longest gap between tokens while a long prompt enters, and its time to the first token, by chunk."""
    run_on_device(
        "chunks", as_json, shape=shape, layers=layers, chunk=chunk, decodes=decodes, context=context, repeats=repeats,
        device=device, seed=seed, commit=commit, out=out,
    )  # fmt: skip


@bench.command(name="host")
@reports(2)
def bench_host(
    clients: Annotated[str, typer.Option(help="Requests in flight; several with commas.")] = "1,16,64,256",
    prompt: Annotated[int, typer.Option(help="Tokens of a request.")] = 64,
    output: Annotated[int, typer.Option(help="Tokens that follow.")] = 256,
    chunk: Annotated[int | None, typer.Option(help="Tokens of a step. Default: as LLM has it on a GPU.")] = None,
    device: OnDevice = "auto",
    seed: Seed = 0,
    commit: Commit = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """The host's share of a step: the engine before a model that computes nothing."""
    run_on_device(
        "host", as_json, clients=clients, prompt=prompt, output=output, chunk=chunk, device=device, seed=seed,
        commit=commit, out=out,
    )  # fmt: skip


@bench.command(name="indexer")
@reports(2)
def bench_indexer(
    shape: ShapeOption = "v32-rank-of-8",
    batch: BatchOption = "1,4,16",
    repeats: Repeats = 7,
    device: OnDevice = "auto",
    seed: Seed = 0,
    commit: Commit = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """The indexer's projection in six arrangements, as single operations with cold weights."""
    run_on_device(
        "indexer", as_json, shape=shape, batch=batch, repeats=repeats, device=device, seed=seed, commit=commit, out=out
    )


@bench.command(name="start")
@reports(2)
def bench_start(
    shape: ShapeOption = "v32-rank-of-8",
    layers: Layers = None,
    batch: BatchOption = "1",
    context: Context = "128",
    arrangement: ArrangementOption = None,
    compilers: Annotated[int, typer.Option(help="Processes that compile kernels while weights are made.")] = 0,
    device: OnDevice = "auto",
    seed: Seed = 0,
    commit: Commit = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Seconds from the start of a process to its first token, with a cold and a warm kernel cache."""
    run_on_device(
        "start", as_json, shape=shape, layers=layers, batch=batch, context=context, arrangement=arrangement,
        compilers=compilers,         device=device, seed=seed, commit=commit, out=out,
    )  # fmt: skip
