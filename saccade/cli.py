"""The command line: `saccade check`, `plan`, `explain`, `generate`, `score`, `eval`, `convert`, `bench`.

Results go to stdout, everything else to stderr; an error is one clear text and an exit code (2; 1 from `check`), never
a traceback. Knows no tensors: torch is imported only inside the commands that run a model, so the others answer at
once. Next: plan/show.py for what `plan` prints, llm.py for what `generate` runs.
"""

import contextlib
import functools
import io
import json
import math
import os
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec

import typer

from saccade.checkpoint.open import bundled_path, looks_remote, open_model
from saccade.errors import RequestError, SaccadeError
from saccade.params import SamplingParams
from saccade.plan import Layout, Plan, make_plan, prove
from saccade.plan.explain import explain as explain_name
from saccade.plan.show import plan_json, show_bytes, show_plan, show_problems

if TYPE_CHECKING:
    from saccade.llm import LLM

P = ParamSpec("P")

# rich would cost more start-up time than reading 163 headers does
app = typer.Typer(
    name="saccade",
    help="Run DeepSeek Sparse Attention models, and see how they load.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
bench = typer.Typer(help="Measure, and print under which conditions.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(bench, name="bench")

Model = Annotated[
    str, typer.Argument(help="Directory, .safetensors file or Hugging Face id. Default: the bundled checkpoint.")
]
Tp = Annotated[int, typer.Option("--tp", help="Ranks that share the model.")]
Ep = Annotated[int, typer.Option("--ep", help="Ranks that divide the experts; divides tp.")]
Rank = Annotated[int, typer.Option("--rank", help="Which rank's plan.")]
Mtp = Annotated[bool, typer.Option("--mtp/--no-mtp", help="With or without the multi-token prediction layer.")]
Dtype = Annotated[str, typer.Option("--dtype", help='"auto" (as stored, else BF16) or "float32".')]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
CacheTokens = Annotated[int | None, typer.Option("--cache-tokens", help="Tokens the cache holds. Default: what fits.")]
Device = Annotated[str, typer.Option("--device", help='"auto", "cpu", "cuda" or "cuda:1".')]

BUNDLED = ""  # the default MODEL; a path would put this machine's directories into --help


def main() -> None:
    """Entry point of the `saccade` command."""
    app()


def reports(code: int) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Make a command end as a command should: SaccadeErrors, and what the system refuses (a full disk behind stdout),
    as one text and exit `code`, Ctrl-C as a quiet 130, a reader that went away (`| head`) as a quiet 141, as SIGPIPE
    would."""

    def wrap(command: Callable[P, None]) -> Callable[P, None]:
        @functools.wraps(command)
        def run(*args: P.args, **kwargs: P.kwargs) -> None:
            try:
                run_and_flush(functools.partial(command, *args, **kwargs))
            except SaccadeError as error:
                say(f"saccade: {error}")
                raise typer.Exit(code) from None
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


def plan_of(model: str, layout: Layout, dtype: str = "auto", mtp: bool = True) -> Plan:
    """The plan of a model, from config and headers alone; on stderr, what had to be fetched for it."""
    path = model or bundled_path()
    is_remote = looks_remote(path)
    config, index = open_model(path)
    if is_remote:
        say(f"fetched {index.bytes_read:,} bytes of {model}")
    return make_plan(config, index, layout, dtype, mtp)


def open_llm(model: str, device: str, dtype: str, cache_tokens: int | None) -> tuple["LLM", str]:
    """A model, and a line on what was loaded; on a terminal, a progress bar while it loads."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    from saccade.llm import LLM

    console = Console(stderr=True)
    columns = (TextColumn("loading"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task, start, size = bar.add_task("", total=None), time.perf_counter(), 0

        def show(done: int, total: int) -> None:
            nonlocal size
            size = total
            bar.update(task, completed=done, total=total)

        llm = LLM(model or None, device, dtype, cache_tokens=cache_tokens, progress=show)
    s, seconds = llm.settings, time.perf_counter() - start
    for note in s.notes:
        say(f"note: {note}")
    return llm, f"loaded {s.path}: {show_bytes(size)} in {seconds:.2f} s, dtype {s.dtype}, {s.device}"


@app.command()
@reports(1)
def check(model: Model = BUNDLED, tp: Tp = 1, ep: Ep = 1, mtp: Mtp = True) -> None:
    """Prove from the file headers that every rank of MODEL loads completely. Exit 1 if not, with every problem."""
    start = time.perf_counter()
    plan = plan_of(model, Layout(tp, ep), mtp=mtp)
    problems = prove(plan)
    seconds = time.perf_counter() - start
    index = plan.index
    size = show_bytes(sum(e.stop - e.start for e in index.entries.values()))
    what = f"{len(index.entries):,} tensors in {len(index.files):,} files, {size}"
    if problems:
        print(f"{plan.index.root}: incomplete, {len(problems):,} problems ({what})")
        print(show_problems(problems, limit=None))
        raise typer.Exit(1)
    ranks = f"{tp} ranks proven (tp {tp}, ep {ep})" if tp > 1 else "1 rank proven"
    size = f"{show_bytes(plan.device_bytes)} on rank 0's device"
    print(f"{plan.index.root}: complete, {what}; {ranks} in {seconds:.2f} s, {size}")


@app.command()
@reports(2)
def plan(
    model: Model = BUNDLED,
    tp: Tp = 1,
    ep: Ep = 1,
    rank: Rank = 0,
    dtype: Dtype = "auto",
    mtp: Mtp = True,
    full: Annotated[bool, typer.Option("--full", help="One line for each parameter, nothing folded.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what one rank of MODEL holds, and from which tensors. Exit 1 if it cannot be loaded completely."""
    made = plan_of(model, Layout(tp, ep, rank), dtype, mtp)
    print(json.dumps(plan_json(made)) if as_json else show_plan(made, full))
    problems = prove(made)
    if problems:
        say(f"\nincomplete, {len(problems):,} problems:\n{show_problems(problems)}")
        raise typer.Exit(1)


@app.command()
@reports(2)
def explain(
    what: Annotated[list[str], typer.Argument(metavar="[MODEL] PARAMETER")],
    tp: Tp = 1,
    ep: Ep = 1,
    rank: Rank = 0,
    dtype: Dtype = "auto",
) -> None:
    """Show the files, byte offsets, shapes and operations of one parameter, or where a checkpoint tensor goes."""
    if len(what) > 2:
        raise typer.BadParameter(f"expected [MODEL] PARAMETER, found {len(what)} names")
    model, parameter = what if len(what) == 2 else (BUNDLED, what[0])
    print(explain_name(plan_of(model, Layout(tp, ep, rank), dtype), parameter))


@app.command()
@reports(2)
def generate(
    prompt: Annotated[str, typer.Option("--prompt", help="Text to go on from.")],
    model: Model = BUNDLED,
    max_tokens: Annotated[int | None, typer.Option(help="New tokens. Default: what context and cache allow.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy. Default: the checkpoint's.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Fewest tokens whose probabilities reach p.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Among the k likeliest tokens; 0: among all.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same tokens.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text. May be repeated.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on past the end token.")] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    cache_tokens: CacheTokens = None,
    looked_at: Annotated[
        int, typer.Option(min=0, help="Name so many words of the prompt that were looked at most.")
    ] = 0,
    as_json: AsJson = False,
) -> None:
    """Go on from a text. The answer streams to stdout; lines about load and speed go to stderr."""
    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop=tuple(stop or ()),
        ignore_eos=ignore_eos,
    )
    llm, loaded = open_llm(model, device, dtype, cache_tokens)
    start, text, tokens, reason = time.perf_counter(), "", list[int](), ""
    prompt_ids = llm.encode(prompt)
    for piece in llm.stream(prompt_ids, params):
        if not as_json:
            print(piece.text, end="", flush=True)
        text, tokens, reason = text + piece.text, tokens + piece.token_ids, piece.finish_reason or ""
    seconds = time.perf_counter() - start
    looks = find_looked(llm, prompt_ids, tokens, looked_at)
    result = {
        "model": llm.settings.path,
        "prompt": prompt,
        "text": text,
        "token_ids": tokens,
        "finish_reason": reason,
        "prompt_tokens": len(prompt_ids),
        "seconds": seconds,
        "tokens_per_second": len(tokens) / seconds,
        **({"looked_at": looks} if looked_at else {}),
    }
    if as_json:
        print(json.dumps(result))
        return
    print(flush=True)
    say(loaded)
    speed = f"{len(tokens)} tokens in {seconds:.2f} s, {len(tokens) / seconds:.1f} tokens/s"
    say(f"{speed}; {len(prompt_ids)} prompt tokens; finish reason {reason}")
    if looked_at and not looks:
        say(f"nothing lay beyond the last {llm.config.index_topk} tokens, all of which every layer sees")
    if looks:
        words = ", ".join(f"{look['text'].strip()} {look['share']:.0%}" for look in looks)
        say(f"looked at most, beyond the last {llm.config.index_topk} tokens: {words}")


def find_looked(llm: "LLM", prompt: list[int], answer: list[int], most: int) -> list[dict[str, Any]]:
    """What eval/looked.py finds, ready for JSON; a pass over prompt and answer that nobody asked for is not made."""
    if most < 1 or not answer:
        return []
    from saccade.eval.looked import find_looks

    return [look._asdict() for look in find_looks(llm, prompt, answer, most)]


@app.command()
@reports(2)
def score(
    tokens: Annotated[str, typer.Option("--tokens", help="Token ids: 1,2,3")],
    model: Model = BUNDLED,
    device: Device = "auto",
    dtype: Dtype = "auto",
    cache_tokens: CacheTokens = None,
    as_json: AsJson = False,
) -> None:
    """Print the log-probability of each token given those before it."""
    try:
        ids = [int(token) for token in tokens.split(",")]
    except ValueError:
        raise RequestError(f"--tokens: expected token ids like 1,2,3, found {tokens!r}") from None
    llm, _ = open_llm(model, device, dtype, cache_tokens)
    logprobs = llm.score(ids)
    if as_json:
        result = {"model": llm.settings.path, "token_ids": ids, "logprobs": logprobs, "sum": math.fsum(logprobs)}
        print(json.dumps(result))
        return
    for token, logprob in zip(ids[1:], logprobs, strict=True):
        print(f"{token:8} {logprob:11.6f}")
    print(f"     sum {math.fsum(logprobs):11.6f}")


@app.command(name="eval")
@reports(2)
def evaluate(
    model: Model = BUNDLED,
    problems: Annotated[int, typer.Option(help="Held-out problems of each task.")] = 24,
    tokens: Annotated[int, typer.Option(help="Length of a long text, in words and signs.")] = 1024,
    probed: Annotated[
        int | None, typer.Option(help="Problems of each task to compare arrangements on; 0: none. Default: 2.")
    ] = None,
    task: Annotated[list[str] | None, typer.Option(help="words, recall or story; may be repeated. All.")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: AsJson = False,
) -> None:
    """Exact match on held-out problems, drafts accepted, and what each arrangement of the indexer changes.

    The problems are those that the bundled model was trained for; arrangements compare on any model.
    """
    from saccade.eval.evaluate import evaluate as run
    from saccade.eval.show import show_report
    from saccade.eval.tasks import TASKS

    report = run(model or None, problems, tokens, probed, device, dtype, task or TASKS, say)
    print(json.dumps(report.to_json()) if as_json else show_report(report))


@app.command()
@reports(2)
def convert(
    model: Annotated[str, typer.Argument(help="Directory, .safetensors file or Hugging Face id.")],
    out: Annotated[str, typer.Argument(help="New or empty directory, or one where the same command was cut short.")],
    upcast: Annotated[list[str] | None, typer.Option(help="Modules to hold in BF16: indexer.wk. Repeatable.")] = None,
    bf16: Annotated[bool, typer.Option("--bf16", help="The whole model in BF16, MTP layer included.")] = False,
    fp8: Annotated[bool, typer.Option("--fp8", help="The published FP8 layout, from a BF16 model.")] = False,
    threads: Annotated[int | None, typer.Option(help="Threads that read and convert. Default: up to 8.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write MODEL anew to OUT: one of --upcast, --bf16 and --fp8. Cut short, the same command goes on."""
    from saccade.convert.command import run

    print(run(model, out, tuple(upcast or ()), bf16, fp8, threads, as_json))


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
    """Load speed against a plain sequential read of the same files, page cache warm. Without MODEL: a synthetic FP8
    checkpoint of 2.7 GB."""
    from saccade.bench.load import bench_load

    result = bench_load(model or None, pairs, threads)
    print_measured(result, as_json)


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

    result = run(gigabytes, pairs, threads, folder)
    print_measured(result, as_json)
