"""The options of a command that chooses tokens: one row each, for whatever command takes them.

Next: engine/params.py, whose fields they set; run.py, whose `generate` has them.
"""

import functools
from collections.abc import Callable
from typing import Annotated, Any

import typer

from saccade.cli.options import put_options
from saccade.cli.prompts import parse_tokens, read_text
from saccade.engine.params import SamplingParams

# Field of SamplingParams: its type on the command line, its option, its default.
OPTIONS: dict[str, tuple[Any, Any, Any]] = {
    "max_tokens": (int | None, typer.Option(help="New tokens. Default: what context and cache allow."), None),
    "min_tokens": (int, typer.Option(help="So many tokens come before any end."), 0),
    "temperature": (float | None, typer.Option(help="0 is greedy. Default: the checkpoint's."), None),
    "top_p": (float | None, typer.Option(help="Fewest tokens whose probabilities reach p."), None),
    "top_k": (int | None, typer.Option(help="Among the k likeliest tokens; 0: among all."), None),
    "min_p": (float | None, typer.Option(help="None less likely than p times the likeliest."), None),
    "presence_penalty": (float | None, typer.Option(help="-2 to 2, off tokens that the answer holds."), None),
    "frequency_penalty": (float | None, typer.Option(help="-2 to 2, for each time that it does."), None),
    "repetition_penalty": (float | None, typer.Option(help="Factor against tokens of prompt and answer."), None),
    "seed": (int | None, typer.Option(help="The same seed gives the same tokens."), None),
    "stop": (list[str] | None, typer.Option(help="End before this text. May be repeated."), None),
    "stop_token_ids": (str | None, typer.Option(metavar="IDS", help="End at one of these tokens: 1,2,3"), None),
    "ignore_eos": (bool, typer.Option("--ignore-eos", help="Go on past the end token."), False),
    "json_schema": (str | None, typer.Option(metavar="FILE", help="The answer is JSON of this schema."), None),
    "regex": (str | None, typer.Option(help="The answer matches this regular expression."), None),
    "grammar": (str | None, typer.Option(metavar="FILE", help="The answer matches this grammar, in EBNF."), None),
}  # fmt: skip


def make_params(given: dict[str, Any]) -> SamplingParams:
    """What the options say. RequestError for values that make no sense, and for files that cannot be read."""
    values = {name: value for name, value in given.items() if value is not None}
    for name, option in (("json_schema", "--json-schema"), ("grammar", "--grammar")):
        if name in values:
            values[name] = read_text(values[name], option)
    if "stop_token_ids" in values:
        values["stop_token_ids"] = parse_tokens(values["stop_token_ids"], "--stop-token-ids")
    return SamplingParams(**values)


def takes_sampling(command: Callable[..., None]) -> Callable[..., None]:
    """`command` with OPTIONS in place of its argument `sampling`, which it calls to know what they say: files are read
    then, and not before."""
    rows = {name: (Annotated[kind, option], default) for name, (kind, option, default) in OPTIONS.items()}
    return put_options(command, "sampling", rows, lambda asked: functools.partial(make_params, asked))
