"""The arguments and options that several commands share, each with its one line of help. `takes_model` gives a command
those of a model that is loaded. Next: app.py.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any, TypeVar

import typer

from saccade import __version__
from saccade.errors import RequestError

OneOrMany = TypeVar("OneOrMany", str, list[str])  # one name or several


def refuse_empty(context: typer.Context, param: typer.CallbackParam, value: OneOrMany) -> OneOrMany:
    """An empty name that was typed, as by `saccade check "$UNSET"`, is not the default, which is empty too."""
    source = context.get_parameter_source(param.name or "")
    if "" in ([value] if isinstance(value, str) else value) and source is not None and source.name == "COMMANDLINE":
        raise RequestError("expected a directory, a .safetensors file or a Hugging Face id, found an empty name")
    return value


def show_version(is_asked: bool) -> None:
    """`saccade 0.1.0, Python 3.11.9, torch 2.13.0`: what a report of a fault should begin with."""
    if is_asked:
        import platform
        from importlib import metadata  # 20 ms, which no other command has to wait for

        found = [f"saccade {__version__}", f"Python {platform.python_version()}"]
        for package in ("torch", "triton"):
            try:
                found.append(f"{package} {metadata.version(package)}")
            except metadata.PackageNotFoundError:
                found.append(f"no {package}")
        print(", ".join(found))
        raise typer.Exit


ModelOption = Annotated[
    str,
    typer.Argument(
        help="Directory, .safetensors file or Hugging Face id. Default: the bundled checkpoint.", callback=refuse_empty
    ),
]
Revision = Annotated[
    str | None,
    typer.Option("--revision", metavar="NAME", help="Branch, tag or commit of a Hugging Face id. Default: main."),
]
Tp = Annotated[int, typer.Option("--tp", help="Ranks that share the model.")]
Ep = Annotated[int, typer.Option("--ep", help="Ranks that divide the experts; divides tp.")]
CheckRanks = Annotated[
    bool, typer.Option("--check-ranks", help="Compare what all ranks compute, and name the first layer that differs.")
]
Rank = Annotated[int, typer.Option("--rank", help="Which rank's plan.")]
MtpOption = Annotated[bool, typer.Option("--mtp/--no-mtp", help="With or without the multi-token prediction layer.")]
Dtype = Annotated[str, typer.Option("--dtype", help='"auto" (as stored, else BF16) or "float32".')]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
PromptFile = Annotated[
    str | None,
    typer.Option("--prompt-file", metavar="FILE", help='The text of a file; "-" is standard input.'),
]
CacheTokens = Annotated[
    int | None, typer.Option("--cache-tokens", help="Tokens the cache holds. Default: by free memory.")
]
IndexCache = Annotated[
    str, typer.Option("--index-cache", help='How index keys are cached: "bf16" (F32 in "float32") or "fp8".')
]
LatentCache = Annotated[
    str, typer.Option("--latent-cache", help='How latents are cached: "bf16" (F32 in "float32") or "fp8".')
]
ActivationsOption = Annotated[
    str,
    typer.Option(
        "--activations", help='What products of long prompts see of their inputs: "exact", "bf16", "fp8", or "auto".'
    ),
]
Kernels = Annotated[
    str, typer.Option("--kernels", help='"fast" (on a GPU), "reference" (plain torch), or "auto": fast where it runs.')
]
Speculate = Annotated[
    str, typer.Option("--speculate", help='Tokens guessed ahead in each step: 0 to 5, or "auto": as many as pay.')
]
Threads = Annotated[
    int | None,
    typer.Option("--threads", help="That compute on a CPU. Default: as many as the model's matrices pay for."),
]
PrefixCacheOption = Annotated[
    bool | None,
    typer.Option(
        "--prefix-cache/--no-prefix-cache",
        help="Keep pages for requests that begin with the same tokens. Default: where the model can.",
    ),
]
Device = Annotated[str, typer.Option("--device", help='"auto", "cpu", "cuda" or "cuda:1".')]
MaxBatchTokens = Annotated[
    int | None, typer.Option("--max-batch-tokens", help="Tokens of a step. Default: 512 on a CPU, 4096 on a GPU.")
]
MaxMixedTokens = Annotated[
    int | None,
    typer.Option("--max-mixed-tokens", help="Tokens of a step of decodes and prompts. Default: for 150 ms on an H200."),
]
LaunchAhead = Annotated[
    str,
    typer.Option(
        "--launch-ahead",
        help='Launch a step before the last one is read: "on", "off", or "auto": on a GPU where 16 requests decode.',
    ),
]
MaxRequests = Annotated[int | None, typer.Option("--max-requests", help="That run at the same time. Default: 64.")]

# Argument of LLM: its option, its default. What a command asks of a model that it loads, beside which model.
MODEL_OPTIONS: dict[str, tuple[Any, Any]] = {
    "device": (Device, "auto"),
    "dtype": (Dtype, "auto"),
    "cache_tokens": (CacheTokens, None),
    "max_batch_tokens": (MaxBatchTokens, None),
    "max_mixed_tokens": (MaxMixedTokens, None),
    "max_requests": (MaxRequests, None),
    "launch_ahead": (LaunchAhead, "auto"),
    "index_cache": (IndexCache, "bf16"),
    "latent_cache": (LatentCache, "bf16"),
    "activations": (ActivationsOption, "auto"),
    "kernels": (Kernels, "auto"),
    "speculate": (Speculate, "0"),
    "mtp": (MtpOption, True),
    "prefix_cache": (PrefixCacheOption, None),
    "revision": (Revision, None),
    "threads": (Threads, None),
    "tp": (Tp, 1),
    "ep": (Ep, 1),
    "check_ranks": (CheckRanks, False),
}
# Those that come together.
PLACE = ("device", "dtype", "cache_tokens", "revision", "threads")
ARITHMETIC = ("index_cache", "latent_cache", "activations", "kernels")
DRAFTS = ("speculate", "mtp")
RANKS = ("tp", "ep", "check_ranks")
BATCH = ("max_requests", "max_batch_tokens", "max_mixed_tokens", "launch_ahead")

Command = Callable[..., None]


def refuse_idle(command: str, beside: str, given: Mapping[str, bool]) -> None:
    """RequestError for the first option that was given although it does nothing `beside` what else was asked for."""
    for option, is_given in given.items():
        if is_given:
            raise RequestError(f"{command}: {option} does nothing {beside}; leave it out")


def list_given(how: Mapping[str, Any], *left_out: str) -> dict[str, bool]:
    """Of MODEL_OPTIONS, by option: whether its value is another than the default."""
    return {
        f"--{name.replace('_', '-')}": value != MODEL_OPTIONS[name][1]
        for name, value in how.items()
        if name not in left_out
    }


def takes_model(*names: str, **defaults: Any) -> Callable[[Command], Command]:
    """A command with these MODEL_OPTIONS in place of its argument `how`, which is what they say: arguments of LLM.
    `defaults` are those that differ from the table's."""
    assert {*names, *defaults} <= MODEL_OPTIONS.keys(), f"no option of a model: {names}, {defaults}"
    rows = {
        name: (option, defaults.get(name, default))
        for name, (option, default) in MODEL_OPTIONS.items()
        if name in names
    }

    def read(given: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in given.items() if name != "prefix_cache" or value is not None}

    return lambda command: put_options(command, "how", rows, read)


def put_options(
    command: Command, argument: str, rows: Mapping[str, tuple[Any, Any]], read: Callable[[dict[str, Any]], Any]
) -> Command:
    """`command` with options in place of one argument, which is what `read` makes of their values. A row is an option
    and its default."""

    @functools.wraps(command)
    def run(**given: Any) -> None:
        asked = {name: given.pop(name) for name in rows}
        command(**given, **{argument: read(asked)})

    keyword = inspect.Parameter.KEYWORD_ONLY
    options = [
        inspect.Parameter(name, keyword, default=default, annotation=option) for name, (option, default) in rows.items()
    ]
    parameters = list[inspect.Parameter]()
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        parameters += options if parameter.name == argument else [parameter.replace(kind=keyword)]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


DEFAULT_MODEL = ""  # the default MODEL; a path would put this machine's directories into --help
