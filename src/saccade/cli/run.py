"""The commands that run a model: `saccade generate`, `score`, `eval`. Torch is imported when one of them is called.

Results go to stdout, lines about load and speed to stderr. Next: api/llm.py for what `generate` runs, eval/evaluate.py.
"""

import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from saccade.api.settings.threads import sleeping_threads
from saccade.base.json_text import to_json
from saccade.base.printable import escape
from saccade.base.result_file import require_place
from saccade.cli.many.answer import answer_file, open_selections
from saccade.cli.options import (
    ARITHMETIC,
    DEFAULT_MODEL,
    DRAFTS,
    PLACE,
    RANKS,
    AsJson,
    ModelOption,
    PromptFile,
    takes_model,
)
from saccade.cli.prompts import choose_one, parse_tokens, read_text
from saccade.cli.sampling import takes_sampling
from saccade.cli.terminal import progress_bar, reports, say, show_answer, tell, watched
from saccade.engine.params import SamplingParams
from saccade.errors import RequestError, SaccadeError
from saccade.parallel.place import find_place, require_ranks
from saccade.plan.show import show_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from saccade.api.llm import LLM
    from saccade.api.loading.prepare import PreparedModel
    from saccade.api.outputs import Piece, Stream


def open_llm(
    model: str, how: dict[str, Any], before: Callable[["PreparedModel"], object] = lambda _: None
) -> tuple["LLM", str]:
    """A model, loaded as `how` says, and a line on what was loaded; on a terminal, progress bars while its weights are
    fetched and loaded. `before` may refuse what is asked of it before they are."""
    with sleeping_threads():
        from saccade.api.llm import LLM
        from saccade.api.loading.prepare import prepare

    start, size = time.perf_counter(), 0
    prepared = prepare(model or None, tell=say, **how)
    before(prepared)
    if prepared.source.missing:
        with progress_bar("fetching") as bar:
            prepared = prepared.fetch(bar)
        say(f"fetched {model} in {time.perf_counter() - start:.1f} s")
        start = time.perf_counter()
    with progress_bar("loading") as bar:

        def show(done: int, total: int) -> None:
            nonlocal size
            size = total
            bar(done, total)

        llm = LLM.of(prepared, show)
    s, seconds = llm.settings, time.perf_counter() - start
    for note in s.notes:
        say(f"note: {note}")
    where = f"dtype {s.dtype}, {s.device}, {s.kernels} kernels"
    return llm, f"loaded {escape(s.path)}: {show_bytes(size)} in {seconds:.2f} s, {where}"


def serve_rank_0(model: str, how: dict[str, Any]) -> None:
    """In a rank other than the first that torchrun has started: do what rank 0 says, and end the process with it. What
    the command asks for is rank 0's to read: a file of prompts may lie on its machine alone."""
    place = find_place(os.environ)
    if place is None:
        return
    require_ranks(place, how["tp"])
    if place.rank > 0:
        with sleeping_threads():
            from saccade.api.loading.prepare import prepare

        prepare(model or None, **how)


@reports(2)
@takes_sampling
@takes_model(*PLACE, *ARITHMETIC, *DRAFTS, "prefix_cache", *RANKS)
def generate(
    *,
    model: ModelOption = DEFAULT_MODEL,
    prompt: Annotated[str | None, typer.Option("--prompt", help="Text to go on from.")] = None,
    prompt_file: PromptFile = None,
    input_file: Annotated[
        str | None,
        typer.Option("--input", metavar="FILE", help='Many prompts, a JSON object a line: "prompt" or "token_ids".'),
    ] = None,
    output: Annotated[
        str, typer.Option(metavar="FILE", help="Of --input: where answers go, a JSON object a line. Default: stdout.")
    ] = "-",
    sampling: Callable[[], SamplingParams] = SamplingParams,
    how: dict[str, Any],
    looked_at: Annotated[
        int, typer.Option(min=0, help="Name so many words of the prompt that were looked at most.")
    ] = 0,
    selections: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Keep what each layer selects, for `look --selections`."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Go on from a text, or from each of many. An answer streams to stdout; lines about load and speed go to stderr."""
    serve_rank_0(model, how)
    params = sampling()
    options = {"--prompt TEXT": prompt, "--prompt-file FILE": prompt_file, "--input FILE": input_file}
    chosen = choose_one("generate", options)
    if looked_at and how["tp"] > 1:
        raise RequestError("generate: --looked-at runs on one rank; expected none with --tp")
    if selections is not None:
        require_place(
            "--selections", selections, {"--output": output, "--input": input_file, "--prompt-file": prompt_file}
        )
    if input_file is not None:
        if as_json or looked_at:
            raise RequestError("generate: --json and --looked-at are for one prompt; answers to --input are JSON")
        load = lambda before: open_llm(model, how, before)  # noqa: E731
        answer_file(input_file, output, params, load, selections)
        return
    if output != "-":
        raise RequestError(f"generate: --output is for --input; expected none with {chosen.split()[0]}")
    prompt = read_text(prompt_file, "--prompt-file") if prompt_file is not None else prompt or ""
    llm, loaded = open_llm(model, how, lambda made: made.check(made.encode(prompt), params))
    start, text, tokens, reason = time.perf_counter(), "", list[int](), ""
    prompt_ids = llm.encode(prompt)
    try:
        with open_selections(selections, llm, 1) as writer:
            part = None if writer is None else writer.open_request(0)
            for piece in show_reading(llm, llm.stream(prompt_ids, params, selections=part)):
                if not as_json:
                    show_answer(piece.text)
                text, tokens, reason = text + piece.text, tokens + piece.token_ids, piece.finish_reason or ""
            if writer is not None:
                from saccade.api.selection_file import KeptRequest

                writer.end([KeptRequest(len(prompt_ids), prompt_ids + tokens)])
    except (KeyboardInterrupt, SaccadeError):
        if text and not as_json:
            show_answer("\n")  # what was said so far is a line
        raise
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
        **({"speculate": asdict(replace(llm.stats, prefix=None))} if llm.settings.speculate else {}),
        **({"looked_at": looks} if looked_at else {}),
    }
    if as_json:
        tell(to_json(result))
        return
    show_answer("\n")
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


def show_reading(llm: "LLM", stream: "Stream") -> "Iterator[Piece]":
    """The pieces of a stream; on a terminal, a bar while a long prompt is read."""
    with watched("reading the prompt", lambda: count_read(llm), "tokens"):
        first = next(stream, None)
    if first is not None:
        yield first
        yield from stream


def count_read(llm: "LLM") -> tuple[int, int]:
    """Prompt tokens that have been read, of those in work, and all of them. May be asked by another thread."""
    requests = list(llm.engine.jobs)
    return sum(min(r.computed, r.prompt_length) for r in requests), sum(r.prompt_length for r in requests)


def find_looked(llm: "LLM", prompt: list[int], answer: list[int], most: int) -> list[dict[str, Any]]:
    """What eval/looked.py finds, ready for JSON; a pass over prompt and answer that nobody asked for is not made."""
    if most < 1 or not answer:
        return []
    from saccade.eval.looked import find_looks

    return [look._asdict() for look in find_looks(llm, prompt, answer, most)]


@reports(2)
@takes_model(*PLACE, *RANKS)
def score(
    *,
    model: ModelOption = DEFAULT_MODEL,
    tokens: Annotated[str | None, typer.Option("--tokens", help="Token ids: 1,2,3")] = None,
    tokens_file: Annotated[
        str | None, typer.Option(metavar="FILE", help='Token ids from a file; "-" is standard input.')
    ] = None,
    text: Annotated[str | None, typer.Option("--text", help="Text, which the tokenizer makes token ids of.")] = None,
    prompt_file: PromptFile = None,
    how: dict[str, Any],
    as_json: AsJson = False,
) -> None:
    """Print the log-probability of each token given those before it."""
    serve_rank_0(model, how)
    files = {"--tokens-file FILE": tokens_file, "--text TEXT": text, "--prompt-file FILE": prompt_file}
    choose_one("score", {"--tokens IDS": tokens, **files})
    asked: str | list[int]
    if tokens is not None:
        asked = parse_tokens(tokens, "--tokens")
    elif tokens_file is not None:
        asked = parse_tokens(read_text(tokens_file, "--tokens-file"), "--tokens-file")
    else:
        asked = read_text(prompt_file, "--prompt-file") if prompt_file is not None else text or ""
    llm, _ = open_llm(model, how, lambda made: made.check_scoring(made.encode(asked)))
    ids = llm.encode(asked)
    with watched("scoring", lambda: count_read(llm), "tokens"):
        logprobs = llm.score(ids)
    if as_json:
        result = {"model": llm.settings.path, "token_ids": ids, "logprobs": logprobs, "sum": math.fsum(logprobs)}
        tell(to_json(result))
        return
    for token, logprob in zip(ids[1:], logprobs, strict=True):
        tell(f"{token:8} {logprob:11.6f}")
    tell(f"     sum {math.fsum(logprobs):11.6f}")


@reports(2)
@takes_model("device", "dtype", *ARITHMETIC, "revision", "threads", "tp", "ep")
def run_eval(
    *,
    model: ModelOption = DEFAULT_MODEL,
    problems: Annotated[int, typer.Option(help="Held-out problems of each task.")] = 24,
    tokens: Annotated[int, typer.Option(help="Length of a long text, in words and signs.")] = 1024,
    probed: Annotated[
        int | None, typer.Option(help="Problems of each task to compare arrangements on; 0: none. Default: 2.")
    ] = None,
    task: Annotated[list[str] | None, typer.Option(help="words, recall or story; may be repeated. All.")] = None,
    how: dict[str, Any],
    as_json: AsJson = False,
) -> None:
    """Exact match on held-out problems, drafts accepted, and what each arrangement of the indexer changes.

    The problems are those that the bundled model was trained for; arrangements compare on any model. With --tp only the
    problems are answered: drafts and arrangements run on one rank.
    """
    serve_rank_0(model, how)
    with sleeping_threads():
        from saccade.eval.evaluate import evaluate as run
    from saccade.eval.show import show_report
    from saccade.eval.tasks import TASKS

    report = run(model or None, problems, tokens, probed, asked=task or TASKS, tell=say, watch=watched, **how)
    tell(to_json(report.to_json()) if as_json else show_report(report))
