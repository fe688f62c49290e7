"""Commands that look inside: `saccade compare`, is it the engine or the model; `saccade look`, where an answer looked.

Next: compare/compare.py, which compares; look/page.py, which shows.
"""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from saccade.api.settings.threads import sleeping_threads
from saccade.base.json_text import to_json
from saccade.base.printable import escape
from saccade.base.result_file import require_place, write_result
from saccade.base.values import show
from saccade.cli.options import (
    ARITHMETIC,
    DEFAULT_MODEL,
    PLACE,
    AsJson,
    ModelOption,
    PromptFile,
    list_given,
    refuse_idle,
    takes_model,
)
from saccade.cli.prompts import choose_one, name_source, read_bytes, read_text
from saccade.cli.run import open_llm
from saccade.cli.serve import KEY_VARIABLE
from saccade.cli.terminal import reports, say, tell
from saccade.engine.params import SamplingParams
from saccade.errors import RequestError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from saccade.api.llm import LLM
    from saccade.api.loading.prepare import PreparedModel
    from saccade.compare.answers import Answerer
    from saccade.look.selected import LookedAnswer
    from saccade.text.tokenizer import Tokenizer

MOST_ANSWER = 64  # tokens of an answer that is compared, if not said otherwise
MOST_SHOWN = 128  # of one that a page shows
OF_OTHER = {"cache_tokens": None, "revision": None, "mtp": False}  # how checkpoint B is loaded otherwise than MODEL


@reports(2)
@takes_model(*PLACE, dtype="float32")  # "auto", weights as stored, where memory is short
def compare(
    *,
    model: ModelOption = DEFAULT_MODEL,
    other: Annotated[
        str | None, typer.Argument(metavar="[B]", help="Another checkpoint, in place of a server.")
    ] = None,
    server: Annotated[str | None, typer.Option(metavar="URL", help="An OpenAI-compatible server.")] = None,
    prompts: Annotated[
        str | None,
        typer.Option(metavar="FILE", help='JSON lines: "prompt", "messages" or "token_ids". Default: some of our own.'),
    ] = None,
    record: Annotated[str | None, typer.Option(metavar="FILE", help="Keep the answers.")] = None,
    replay: Annotated[str | None, typer.Option(metavar="FILE", help="Take answers that were kept.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, max=4096, help="Of an answer.")] = MOST_ANSWER,
    served_model: Annotated[
        str | None, typer.Option(metavar="NAME", help="What the server calls the model. Default: the first it names.")
    ] = None,
    api_key: Annotated[str | None, typer.Option(help="Of the server. Default: $SACCADE_API_KEY, or none.")] = None,
    how: dict[str, Any],
    as_json: AsJson = False,
) -> None:
    """Compare a server's log-probabilities, or those of checkpoint B, with what MODEL says. Exit 1 if they differ by
    more than rounding, with what explains it and the token where it starts."""
    given = [name for name, value in (("B", other), ("--server", server), ("--replay", replay)) if value is not None]
    if len(given) != 1:
        raise RequestError(f"compare: expected one of B, --server and --replay, found {' and '.join(given) or 'none'}")
    if replay is not None and (prompts is not None or record is not None):
        raise RequestError("compare: --replay has its own prompts; expected neither --prompts nor --record")
    if replay is not None:
        refuse_idle("compare", "with --replay, whose answers are there", {"--max-tokens": max_tokens != MOST_ANSWER})
    if server is None:
        idle = {"--served-model": served_model is not None, "--api-key": api_key is not None}
        refuse_idle("compare", "without --server", idle)
    if record is not None:
        require_place("--record", record, {"--prompts": prompts})
    with sleeping_threads():
        from saccade.compare.compare import Comparer
    from saccade.compare.questions import draw_questions, read_questions
    from saccade.compare.recorded import read_record, write_record
    from saccade.compare.show import show_comparison

    recorded = None if replay is None else read_record(replay)
    raw = None if prompts is None else read_questions(read_bytes(prompts, "--prompts"), name_source(prompts))
    others: list[Answerer] = []

    def find_other(made: "PreparedModel") -> None:
        """The other side, or what refuses it, before the weights of this one are fetched and loaded."""
        if recorded is not None:
            others.append(recorded)
        elif server is not None:
            others.append(ask_server(server, made, served_model, api_key or os.environ.get(KEY_VARIABLE)))
        else:
            check_other(made, other or "", how)

    llm, loaded = open_llm(model, {**how, "mtp": False}, find_other)
    say(loaded)
    asked = recorded.prompts if recorded is not None else raw or draw_questions(llm)
    answerer = others[0] if others else open_other(other or "", how)
    comparer = Comparer(llm, say)
    if record is not None:
        answers = comparer.ask(answerer, asked, max_tokens)
        write_record(record, answerer.title, answers)
        answerer = read_record(record)
    report = comparer.compare(answerer, asked, max_tokens)
    tell(to_json(report.to_json()) if as_json else show_comparison(report))
    if report.findings:
        raise typer.Exit(1)


@reports(2)
@takes_model(*PLACE, *ARITHMETIC)
def look(
    *,
    model: ModelOption = DEFAULT_MODEL,
    prompt: Annotated[str | None, typer.Option("--prompt", help="Text to go on from.")] = None,
    prompt_file: PromptFile = None,
    out: Annotated[str, typer.Option(metavar="FILE", help="The page: HTML, in one file.")] = "look.html",
    max_tokens: Annotated[int, typer.Option(min=1, max=4096, help="Of the answer, the likeliest.")] = MOST_SHOWN,
    selections: Annotated[
        str | None, typer.Option(metavar="FILE", help="Show what `generate --selections` kept; needs no weights.")
    ] = None,
    request: Annotated[int, typer.Option(min=0, help="Of --selections: which of its requests, from 0.")] = 0,
    how: dict[str, Any],
) -> None:
    """Write a page that shows where each layer's indexer looked for each token of an answer."""
    options = {"--prompt TEXT": prompt, "--prompt-file FILE": prompt_file, "--selections FILE": selections}
    choose_one("look", options)
    require_place("--out", out, {"--prompt-file": prompt_file, "--selections": selections})
    from saccade.look.page import make_page

    if selections is not None:
        ignored = {"--max-tokens": max_tokens != MOST_SHOWN, **list_given(how, "revision")}
        refuse_idle("look", "with --selections, whose answers are there", ignored)
        title, found = read_look(model, how["revision"], selections, request)
    else:
        refuse_idle("look", "without --selections", {"--request": request != 0})
        text = read_text(prompt_file, "--prompt-file") if prompt_file is not None else prompt or ""
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
        llm, loaded = open_llm(model, {**how, "mtp": False}, lambda made: made.check(made.encode(text), params))
        say(loaded)
        title, found = llm.settings.path, find_look(llm, llm.encode(text), params)
    write_result("--out", out, make_page(found, title=f"Saccade: {title}"))
    tell("".join(found.answer))
    say(f"{escape(out)} shows where it looked")


def find_look(llm: "LLM", tokens: list[int], params: SamplingParams) -> "LookedAnswer":
    """The answer to `tokens`, and where it looked."""
    from saccade.text.tokenizer import require_tokenizer

    made = llm.generate([tokens], params, capture_selection=True)[0]
    tokenizer = require_tokenizer(llm.tokenizer, "a page", llm.no_text)
    return spell_look(tokenizer, tokens, made.token_ids, made.selections or ())


def read_look(model: str, revision: str | None, path: str, request: int) -> "tuple[str, LookedAnswer]":
    """A title, and a request of a file of selections with its words. Only the model's small files are read."""
    from saccade.api.loading.side_files import read_side_files
    from saccade.api.selection_file import SelectionReader
    from saccade.checkpoint.hub.fetch import open_source
    from saccade.text.tokenizer import require_tokenizer

    reader = SelectionReader(path)
    name = name_source(path)
    if request not in reader.requests:
        held = f"{reader.requests[0]} to {reader.requests[-1]}" if reader.requests else "none"
        raise RequestError(f"--request: {name} has no request {request}, it holds {held}")
    prompt, tokens = reader.read_tokens(request)
    source = open_source(model or None, revision, say)
    side = read_side_files(source.directory, source.config.eos_token_ids, source.config.vocab_size)
    tokenizer = require_tokenizer(side.tokenizer, "a page", side.obstacle)
    if max(tokens) >= source.config.vocab_size:
        raise RequestError(f"--selections: {name} has token {max(tokens)}, which is not in the model's vocabulary")
    look = spell_look(tokenizer, tokens[:prompt], tokens[prompt:], reader.read(request))
    return f"{source.root}, request {request} of {name}", look


def spell_look(
    tokenizer: "Tokenizer", prompt: list[int], answer: list[int], selections: "Sequence[Tensor] | np.ndarray"
) -> "LookedAnswer":
    from saccade.look.selected import LookedAnswer, list_selected, spell_piece
    from saccade.text.token_bytes import TokenBytes

    spell = TokenBytes(tokenizer)
    asked, said = ([spell_piece(spell.find(token)) for token in side] for side in (prompt, answer))
    return LookedAnswer(asked, said, list_selected(selections, len(prompt), len(answer)))


def ask_server(url: str, made: "PreparedModel", model: str | None, key: str | None) -> "Answerer":
    """A server that answers. RequestError if it does not."""
    from saccade.compare.server import ServerAnswers
    from saccade.compare.tokens import AnswerTokens

    return ServerAnswers(url, AnswerTokens(made.side.tokenizer, made.config.vocab_size), model, key)


def check_other(made: "PreparedModel", other: str, how: dict[str, Any]) -> None:
    """SaccadeError if checkpoint B cannot be loaded, or has another vocabulary."""
    from saccade.api.loading.prepare import prepare

    second = prepare(other, **{**how, **OF_OTHER})
    sizes = made.config.vocab_size, second.config.vocab_size
    if sizes[0] != sizes[1]:
        raise RequestError(f"compare: {show(other)} has {sizes[1]} tokens, the model {sizes[0]}: not the same model")


def open_other(other: str, how: dict[str, Any]) -> "Answerer":
    """Checkpoint B."""
    from saccade.compare.local import LocalAnswers

    second, loaded = open_llm(other, {**how, **OF_OTHER})
    say(loaded)
    return LocalAnswers(second)
