"""The command line: `saccade check`, `plan`, `generate`, `chat`, `score`, `eval`, `compare`, `convert` and others.

Results go to stdout, everything else to stderr. What is wrong with a checkpoint is exit code 1; what is wrong with the
request is one clear text and 2, never a traceback. Knows no tensors: torch is imported only inside the commands that
run a model, so the others answer at once. Next: run.py for those; plan/show.py for what `plan` prints.
"""

import time
from dataclasses import replace
from typing import Annotated

import typer

from saccade.base.json_text import to_json
from saccade.base.values import show_count
from saccade.checkpoint.index import SUFFIX
from saccade.checkpoint.open import bundled_path, looks_remote, open_model
from saccade.cli.bench import bench
from saccade.cli.chat import chat
from saccade.cli.inside import compare, look
from saccade.cli.options import (
    DEFAULT_MODEL,
    AsJson,
    Dtype,
    Ep,
    IndexCache,
    LatentCache,
    ModelOption,
    MtpOption,
    Rank,
    Revision,
    Tp,
    refuse_empty,
    refuse_idle,
    show_version,
)
from saccade.cli.run import generate, run_eval, score
from saccade.cli.serve import serve
from saccade.cli.terminal import progress_bar, reports, say, tell
from saccade.cli.usage import Commands
from saccade.config.file import Config
from saccade.errors import CheckpointError, RequestError
from saccade.inspect.show import Checked, check_json, show_check
from saccade.models.cache_rows import check_caches
from saccade.plan import Layout, Plan, make_plan, plan_all, prove_ranks
from saccade.plan.diff import diff, diff_json, open_side, show_diff
from saccade.plan.explain import explain as explain_name
from saccade.plan.problems import show_causes
from saccade.plan.show import plan_json, show_plan

# rich would cost more start-up time than reading 163 headers does
app = typer.Typer(
    name="saccade",
    help="Run DeepSeek Sparse Attention models, and see how they load.",
    cls=Commands,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(bench, name="bench")


@app.callback()
def show_options(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version and end.")
    ] = False,
) -> None:
    """Options of `saccade` itself. The help of the commands is the app's."""


def main() -> None:
    """Parse the command line and run its command; `saccade.__main__` calls it."""
    app(prog_name="saccade")  # also as `python -m saccade`, which no shell can complete


def plan_of(
    model: str, layout: Layout, dtype: str = "auto", mtp: bool = True, revision: str | None = None, notes: bool = True
) -> Plan:
    """The plan of a model, from config and headers alone; on stderr, what was fetched, and config.json's notes."""
    path = model or bundled_path()
    is_remote = looks_remote(path)
    config, index = open_model(path, revision=revision, tell=say)
    if is_remote and index.root == model:  # and not the download cache
        say(f"fetched {index.bytes_read:,} bytes of {model}")
    if notes:
        tell_notes(config)
    return make_plan(config, index, layout, dtype, mtp)


def tell_notes(config: Config, of: str = "") -> None:
    """What config.json says and the engine does not do, on stderr: no command passes over it in silence."""
    for note in config.notes:
        say(f"note: {of}{note}")


@app.command()
@reports(2)
def check(
    model: ModelOption = DEFAULT_MODEL,
    tp: Tp = 1,
    ep: Ep = 1,
    mtp: MtpOption = True,
    contents: Annotated[bool, typer.Option("--contents", help="Then read every tensor and judge its numbers.")] = False,
    sha256: Annotated[str | None, typer.Option(metavar="FILE", help="Digests, as sha256sum prints them.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads that read. Default: up to 8.")] = None,
    revision: Revision = None,
    as_json: AsJson = False,
) -> None:
    """Prove from the file headers that every rank of MODEL loads completely. Exit 1 if not, with every problem; 2
    if there is nothing to check."""
    start, reads_files = time.perf_counter(), contents or sha256 is not None
    if not reads_files:
        refuse_idle("check", "without --contents or --sha256", {"--threads": threads is not None})
    if reads_files and looks_remote(model or bundled_path()):
        text = "--contents and --sha256 read the files: download the model (`hf download`) and give its path"
        raise CheckpointError(f"{model}: {text}")
    plan = plan_of(model, Layout(tp, ep), mtp=mtp, revision=revision)
    plans = plan_all(plan)
    held, problems = tuple(p.device_bytes for p in plans), tuple(prove_ranks(plans))
    checked = Checked(plan, held, problems, time.perf_counter() - start)
    if reads_files:
        from saccade.inspect.contents import check_contents

        is_directory = not model.endswith(SUFFIX)
        with progress_bar("reading") as bar:
            found = check_contents(plan.config, plan.index, contents, sha256, threads, bar, is_directory)
        checked = replace(checked, contents=found)
    tell(to_json(check_json(checked)) if as_json else show_check(checked))
    if not checked.is_sound:
        raise typer.Exit(1)


@app.command()
@reports(2)
def plan(
    model: ModelOption = DEFAULT_MODEL,
    tp: Tp = 1,
    ep: Ep = 1,
    rank: Rank = 0,
    dtype: Dtype = "auto",
    mtp: MtpOption = True,
    index_cache: IndexCache = "bf16",
    latent_cache: LatentCache = "bf16",
    full: Annotated[bool, typer.Option("--full", help="One line for each parameter, nothing folded.")] = False,
    other: Annotated[str | None, typer.Option("--diff", metavar="B", help="Show how model B differs instead.")] = None,
    revision: Revision = None,
    as_json: AsJson = False,
) -> None:
    """Show what one rank of MODEL holds, and from which tensors. Exit 1 if it cannot be loaded completely, or, with
    --diff, if the two differ; of both, only headers are read."""
    check_caches(index_cache, latent_cache)
    if other is not None:
        refuse_idle("plan", "with --diff", {"--full": full, "--index-cache": index_cache != "bf16"})
        layout, names = Layout(tp, ep, rank), (model or bundled_path(), other)
        a, b = (
            open_side(str(name), layout, dtype, mtp, say, revision if looks_remote(name) else None) for name in names
        )
        for side in (a, b):
            tell_notes(side.plan.config, f"{side.plan.index.title}: ")
        found = diff(a, b)
        tell(to_json(diff_json(a, b, found)) if as_json else show_diff(a, b, found))
        raise typer.Exit(1 if found else 0)
    made = plan_of(model, Layout(tp, ep, rank), dtype, mtp, revision, notes=as_json)  # the table has them
    plans = plan_all(made)
    held = [p.device_bytes for p in plans]
    if as_json:
        tell(to_json(plan_json(made) | {"rank_bytes": held}))
    else:
        tell(show_plan(made, full, index_cache, held, latent_cache))
    problems = prove_ranks(plans)
    if problems:
        say(f"\nincomplete, {show_count(len(problems), 'problem')}:\n{show_causes(problems, made.index)}")
        raise typer.Exit(1)


@app.command()
@reports(2)
def explain(
    what: Annotated[list[str], typer.Argument(metavar="[MODEL] PARAMETER", callback=refuse_empty)],
    tp: Tp = 1,
    ep: Ep = 1,
    rank: Rank = 0,
    dtype: Dtype = "auto",
    revision: Revision = None,
) -> None:
    """Show the files, byte offsets, shapes and operations of one parameter, or where a checkpoint tensor goes."""
    if len(what) > 2:
        raise typer.BadParameter(f"expected [MODEL] PARAMETER, found {len(what)} names")
    model, parameter = what if len(what) == 2 else (DEFAULT_MODEL, what[0])
    tell(explain_name(plan_of(model, Layout(tp, ep, rank), dtype, revision=revision), parameter))


app.command()(generate)
app.command()(chat)
app.command()(score)
app.command()(serve)
app.command()(compare)
app.command()(look)
app.command(name="eval")(run_eval)


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
    link: Annotated[
        str | None,
        typer.Option(
            metavar="hard|sym|copy", help="How unchanged files get to OUT. Default: hard links where they can be."
        ),
    ] = None,
    revision: Revision = None,
    as_json: AsJson = False,
) -> None:
    """Write MODEL anew to OUT: one of --upcast, --bf16 and --fp8. Cut short, the same command goes on."""
    from saccade.cli.convert import run_convert

    if not out:
        raise RequestError("convert: expected a directory to write to, found an empty name")
    tell(run_convert(model, out, tuple(upcast or ()), bf16, fp8, threads, as_json, link, revision))
