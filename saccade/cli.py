"""The command line: `saccade check`, `plan`, `explain`, `generate`, `score`, `eval`, `convert`, `bench`.

Results go to stdout, everything else to stderr. What is wrong with a checkpoint is exit code 1; what is wrong with the
request is one clear text and 2, never a traceback. Knows no tensors: torch is imported only inside the commands that
run a model, so the others answer at once. Next: plan/show.py for what `plan` prints, llm.py for what `generate` runs.
"""

import json
import math
import time
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from saccade.cache_bytes import check_index_cache
from saccade.checkpoint.index import SUFFIX
from saccade.checkpoint.open import bundled_path, looks_remote, open_model
from saccade.cli_bench import bench
from saccade.errors import CheckpointError, RequestError
from saccade.inspect.show import Checked, check_json, show_check
from saccade.options import (
    BUNDLED,
    AsJson,
    CacheTokens,
    Device,
    Dtype,
    Ep,
    IndexCache,
    Kernels,
    Model,
    Mtp,
    Rank,
    Speculate,
    Tp,
    refuse_empty,
)
from saccade.params import SamplingParams
from saccade.plan import Layout, Plan, make_plan, plan_all, prove_ranks
from saccade.plan.diff import diff, diff_json, open_side, show_diff
from saccade.plan.explain import explain as explain_name
from saccade.plan.show import plan_json, show_bytes, show_plan, show_problems
from saccade.terminal import progress_bar, reports, say

if TYPE_CHECKING:
    from saccade.llm import LLM

# rich would cost more start-up time than reading 163 headers does
app = typer.Typer(
    name="saccade",
    help="Run DeepSeek Sparse Attention models, and see how they load.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(bench, name="bench")


def main() -> None:
    """Entry point of the `saccade` command."""
    app()


def plan_of(model: str, layout: Layout, dtype: str = "auto", mtp: bool = True) -> Plan:
    """The plan of a model, from config and headers alone; on stderr, what had to be fetched for it."""
    path = model or bundled_path()
    is_remote = looks_remote(path)
    config, index = open_model(path)
    if is_remote:
        say(f"fetched {index.bytes_read:,} bytes of {model}")
    return make_plan(config, index, layout, dtype, mtp)


def open_llm(model: str, device: str, dtype: str, cache_tokens: int | None, **options: Any) -> tuple["LLM", str]:
    """A model, and a line on what was loaded; on a terminal, a progress bar while it loads."""
    from saccade.llm import LLM

    start, size = time.perf_counter(), 0
    with progress_bar("loading") as bar:

        def show(done: int, total: int) -> None:
            nonlocal size
            size = total
            bar(done, total)

        llm = LLM(model or None, device, dtype, progress=show, cache_tokens=cache_tokens, **options)
    s, seconds = llm.settings, time.perf_counter() - start
    for note in s.notes:
        say(f"note: {note}")
    how = f"dtype {s.dtype}, {s.device}, {s.kernels} kernels"
    return llm, f"loaded {s.path}: {show_bytes(size)} in {seconds:.2f} s, {how}"


@app.command()
@reports(2)
def check(
    model: Model = BUNDLED,
    tp: Tp = 1,
    ep: Ep = 1,
    mtp: Mtp = True,
    contents: Annotated[bool, typer.Option("--contents", help="Then read every tensor and judge its numbers.")] = False,
    sha256: Annotated[str | None, typer.Option(metavar="FILE", help="Digests, as sha256sum prints them.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads that read. Default: up to 8.")] = None,
    as_json: AsJson = False,
) -> None:
    """Prove from the file headers that every rank of MODEL loads completely. Exit 1 if not, with every problem; 2
    if there is nothing to check."""
    start, reads_files = time.perf_counter(), contents or sha256 is not None
    if reads_files and looks_remote(model or bundled_path()):
        text = "--contents and --sha256 read the files: download the model (`hf download`) and give its path"
        raise CheckpointError(f"{model}: {text}")
    plan = plan_of(model, Layout(tp, ep), mtp=mtp)
    plans = plan_all(plan)
    held, problems = tuple(p.device_bytes for p in plans), tuple(prove_ranks(plans))
    checked = Checked(plan, held, problems, time.perf_counter() - start)
    if reads_files:
        from saccade.inspect.contents import check_contents

        is_directory = not model.endswith(SUFFIX)
        with progress_bar("reading") as bar:
            found = check_contents(plan.config, plan.index, contents, sha256, threads, bar, is_directory)
        checked = replace(checked, contents=found)
    print(json.dumps(check_json(checked)) if as_json else show_check(checked))
    if not checked.is_sound:
        raise typer.Exit(1)


@app.command()
@reports(2)
def plan(
    model: Model = BUNDLED,
    tp: Tp = 1,
    ep: Ep = 1,
    rank: Rank = 0,
    dtype: Dtype = "auto",
    mtp: Mtp = True,
    index_cache: IndexCache = "bf16",
    full: Annotated[bool, typer.Option("--full", help="One line for each parameter, nothing folded.")] = False,
    other: Annotated[str | None, typer.Option("--diff", metavar="B", help="Show how model B differs instead.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show what one rank of MODEL holds, and from which tensors. Exit 1 if it cannot be loaded completely, or, with
    --diff, if the two differ; of both, only headers are read."""
    check_index_cache(index_cache)
    if other is not None:
        layout, names = Layout(tp, ep, rank), (model or bundled_path(), other)
        a, b = (open_side(str(name), layout, dtype, mtp, say) for name in names)
        found = diff(a, b)
        print(json.dumps(diff_json(a, b, found)) if as_json else show_diff(a, b, found))
        raise typer.Exit(1 if found else 0)
    made = plan_of(model, Layout(tp, ep, rank), dtype, mtp)
    plans = plan_all(made)
    held = [p.device_bytes for p in plans]
    print(json.dumps(plan_json(made) | {"rank_bytes": held}) if as_json else show_plan(made, full, index_cache, held))
    problems = prove_ranks(plans)
    if problems:
        say(f"\nincomplete, {len(problems):,} problems:\n{show_problems(problems)}")
        raise typer.Exit(1)


@app.command()
@reports(2)
def explain(
    what: Annotated[list[str], typer.Argument(metavar="[MODEL] PARAMETER", callback=refuse_empty)],
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
    index_cache: IndexCache = "bf16",
    kernels: Kernels = "auto",
    speculate: Speculate = "0",
    mtp: Mtp = True,
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
    how = {"index_cache": index_cache, "kernels": kernels, "speculate": speculate, "mtp": mtp}
    llm, loaded = open_llm(model, device, dtype, cache_tokens, **how)
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
        **({"speculate": asdict(llm.stats)} if llm.settings.speculate else {}),
        **({"looked_at": looks} if looked_at else {}),
    }
    if as_json:
        print(json.dumps(result))
        return
    print(flush=True)
    say(loaded)
    speed = f"{len(tokens)} tokens in {seconds:.2f} s, {len(tokens) / seconds:.1f} tokens/s"
    say(f"{speed}; {len(prompt_ids)} prompt tokens; finish reason {reason}")
    if llm.settings.speculate:
        say(str(llm.stats))
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
    index_cache: IndexCache = "bf16",
    kernels: Kernels = "auto",
    as_json: AsJson = False,
) -> None:
    """Exact match on held-out problems, drafts accepted, and what each arrangement of the indexer changes.

    The problems are those that the bundled model was trained for; arrangements compare on any model.
    """
    from saccade.eval.evaluate import evaluate as run
    from saccade.eval.show import show_report
    from saccade.eval.tasks import TASKS

    report = run(model or None, problems, tokens, probed, device, dtype, task or TASKS, say, index_cache, kernels)
    print(json.dumps(report.to_json()) if as_json else show_report(report))


@app.command()
@reports(2)
def convert(
    model: Annotated[
        str, typer.Argument(help="Directory, .safetensors file or Hugging Face id.", callback=refuse_empty)
    ],
    out: Annotated[str, typer.Argument(help="New or empty directory, or one where the same command was cut short.")],
    upcast: Annotated[list[str] | None, typer.Option(help="Modules to hold in BF16: indexer.wk. Repeatable.")] = None,
    bf16: Annotated[bool, typer.Option("--bf16", help="The whole model in BF16, MTP layer included.")] = False,
    fp8: Annotated[bool, typer.Option("--fp8", help="The published FP8 layout, from a BF16 model.")] = False,
    threads: Annotated[int | None, typer.Option(help="Threads that read and convert. Default: up to 8.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write MODEL anew to OUT: one of --upcast, --bf16 and --fp8. Cut short, the same command goes on."""
    from saccade.convert.command import run

    if not out:
        raise RequestError("convert: expected a directory to write to, found an empty name")
    print(run(model, out, tuple(upcast or ()), bf16, fp8, threads, as_json))
