"""Commands that look inside: `saccade compare`, is it the engine or the model; `saccade look`, where an answer looked.

Next: compare/compare.py, which compares; look/page.py, which shows.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from saccade.api.threads import sleeping_threads
from saccade.base.json_text import to_json
from saccade.base.values import show
from saccade.cli.options import (
    ARITHMETIC,
    DEFAULT_MODEL,
    PLACE,
    AsJson,
    ModelOption,
    PromptFile,
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
    from saccade.compare.answers import Answerer
    from saccade.look.selected import LookedAnswer
    from saccade.text.tokenizer import Tokenizer


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
    max_tokens: Annotated[int, typer.Option(min=1, max=4096, help="Of an answer.")] = 64,
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
    with sleeping_threads():
        from saccade.compare.compare import Comparer
    from saccade.compare.questions import draw_questions, read_questions
    from saccade.compare.recorded import read_record, write_record
    from saccade.compare.show import show_comparison

    recorded = None if replay is None else read_record(replay)
    raw = None if prompts is None else read_questions(read_bytes(prompts, "--prompts"), name_source(prompts))
    llm, loaded = open_llm(model, {**how, "mtp": False})
    say(loaded)
    asked = recorded.prompts if recorded is not None else raw or draw_questions(llm)
    answerer: Answerer
    if recorded is not None:
        answerer = recorded
    elif other is not None:
        answerer = open_other(llm, other, how)
    else:
        from saccade.compare.server import ServerAnswers

        answerer = ServerAnswers(server or "", llm, served_model, api_key or os.environ.get(KEY_VARIABLE))
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
    max_tokens: Annotated[int, typer.Option(min=1, max=4096, help="Of the answer, which is the likeliest.")] = 128,
    selections: Annotated[
        str | None, typer.Option(metavar="FILE", help="Show what `generate --selections` kept; needs no weights.")
    ] = None,
    request: Annotated[int, typer.Option(min=0, help="Of --selections: which of its requests, from 0.")] = 0,
    how: dict[str, Any],
) -> None:
    """Write a page that shows where each layer's indexer looked for each token of an answer."""
    options = {"--prompt TEXT": prompt, "--prompt-file FILE": prompt_file, "--selections FILE": selections}
    choose_one("look", options)
    from saccade.look.page import make_page

    if selections is not None:
        with page_at(out) as write:
            title, kept = read_look(model, how["revision"], selections, request)
            write(make_page(kept, title=f"Saccade: {title}"))
        tell("".join(kept.answer))
        say(f"{name_source(out)} shows where it looked")
        return
    text = read_text(prompt_file, "--prompt-file") if prompt_file is not None else prompt or ""
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    with page_at(out) as write:
        llm, loaded = open_llm(model, {**how, "mtp": False}, lambda made: made.check(made.encode(text), params))
        say(loaded)
        found = find_look(llm, llm.encode(text), params)
        write(make_page(found, title=f"Saccade: {llm.settings.path}"))
    tell("".join(found.answer))
    say(f"{name_source(out)} shows where it looked")


@contextmanager
def page_at(path: str) -> Iterator[Callable[[str], object]]:
    """What writes the page, at the end: a model that cannot be run leaves the file as it was. RequestError before it is
    loaded if nothing can be written there."""
    is_new = not os.path.lexists(path)
    try:
        with open(path, "ab"):
            pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RequestError(f"--out: {name_source(path)} cannot be written: {reason}") from None
    try:
        yield lambda text: Path(path).write_text(text, "utf-8")
    except BaseException:
        if is_new:
            Path(path).unlink(missing_ok=True)
        raise


def find_look(llm: "LLM", tokens: list[int], params: SamplingParams) -> "LookedAnswer":
    """The answer to `tokens`, and where it looked."""
    from saccade.text.tokenizer import require_tokenizer

    made = llm.generate([tokens], params, capture_selection=True)[0]
    tokenizer = require_tokenizer(llm.tokenizer, "a page", llm.no_text)
    return spell_look(tokenizer, tokens, made.token_ids, made.selections or ())


def read_look(model: str, revision: str | None, path: str, request: int) -> "tuple[str, LookedAnswer]":
    """A title, and a request of a file of selections with its words. Only the model's small files are read."""
    from saccade.api.selection_file import SelectionReader
    from saccade.api.side_files import read_side_files
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


def open_other(llm: "LLM", other: str, how: dict[str, Any]) -> "Answerer":
    """Checkpoint B. RequestError if its vocabulary is another one."""
    from saccade.compare.local import LocalAnswers

    second, loaded = open_llm(other, {**how, "cache_tokens": None, "revision": None, "mtp": False})
    say(loaded)
    sizes = llm.config.vocab_size, second.config.vocab_size
    if sizes[0] != sizes[1]:
        raise RequestError(f"compare: {show(other)} has {sizes[1]} tokens, the model {sizes[0]}: not the same model")
    return LocalAnswers(second)
