"""What is asked of a model becomes requests of its engine, all or none; what they come to becomes `Completion`s.

Knows one engine and token ids; the texts of prompts are read by whom it is given. Next: llm.py, which asks; outputs.py;
engine/shared.py.
"""

from collections.abc import Callable
from contextlib import nullcontext
from os import PathLike

from saccade.api.outputs import Completion, Stream, describe_errors
from saccade.api.selection_file import KeptRequest, SelectionWriter
from saccade.engine.engine import Engine
from saccade.engine.params import SamplingParams, check_params
from saccade.engine.request import Job
from saccade.engine.shared import SharedEngine
from saccade.engine.steps.selections import SelectionParts
from saccade.errors import NumericsError, RequestError
from saccade.text.prompts import Prompt

Encode = Callable[[Prompt], list[int]]


def complete_all(
    shared: SharedEngine,
    prompts: list[Prompt],
    encode: Encode,
    options: list[SamplingParams],
    capture: bool | str | PathLike[str],
    positions: int,
) -> list[Completion]:
    """The answers to `prompts` in order, n of each where its `options` ask for n. `capture`, and what is raised: as in
    `LLM.generate`; `positions`: that a selection holds at most."""
    writer = None
    if not isinstance(capture, bool):
        writer = SelectionWriter(capture, sum(given.n for given in options), positions)
    with nullcontext() if writer is None else writer:
        jobs = add_all(shared, prompts, encode, options, bool(capture), writer)
        shared.run(jobs)
        if writer is not None:
            writer.end([KeptRequest(job.request.prompt_length, job.request.tokens) for job in jobs])
    completions = [complete(job, bool(shared.engine.speculate)) for job in jobs]
    owners = [i for i, given in enumerate(options) for _ in range(given.n)]
    failed = [(i, job) for i, job in zip(owners, jobs, strict=True) if job.error is not None]
    if failed:
        text = describe_errors([(i, job.error or "") for i, job in failed], len(jobs))
        raise failed[0][1].error_type(text, tuple(completions))
    return completions


def add_all(
    shared: SharedEngine,
    prompts: list[Prompt],
    encode: Encode,
    options: list[SamplingParams],
    capture: bool,
    writer: SelectionWriter | None,
) -> list[Job]:
    """All requests or none: RequestError names every prompt that is refused. `writer` takes what is captured."""
    tokens, refused = list[list[int]](), dict[int, RequestError]()
    for i, prompt in enumerate(prompts):
        try:
            compile_grammar(shared.engine, options[i])
            tokens.append(encode(prompt))
        except RequestError as error:
            tokens.append([])
            refused[i] = error

    def queue(engine: Engine) -> list[Job]:
        jobs = list[Job]()
        try:
            for i, params in enumerate(options):
                try:
                    if i not in refused:
                        jobs.extend(engine.add(tokens[i], one, capture) for one in params.each())
                except RequestError as error:
                    refused[i] = error
            if refused:
                told = (f"prompt {i}: {refused[i]}" if len(prompts) > 1 else str(refused[i]) for i in sorted(refused))
                raise RequestError("\n".join(told))
            if writer is not None:
                for number, job in enumerate(jobs):
                    job.seen = writer.open_request(number)
        except BaseException:  # nobody else knows of these jobs
            for job in jobs:
                engine.cancel(job)
            raise
        return jobs

    return shared.admit(queue)


def compile_grammar(engine: Engine, params: SamplingParams | None) -> None:
    """Compile a request's grammar before it takes a turn of the engine, which finds it in the cache."""
    if params is not None and params.constraint is not None:
        engine.wanted.grammars.compile(params.constraint)


def open_stream(
    shared: SharedEngine, tokens: list[int], params: SamplingParams | None, selections: SelectionParts | None
) -> Stream:
    """The answer to one prompt as it comes; `selections` takes what each step selects."""
    params = None if params is None else check_params(params)
    compile_grammar(shared.engine, params)

    def queue(engine: Engine) -> Stream:
        job = engine.add(tokens, params, capture=selections is not None)
        job.seen = selections
        return Stream(shared, job, shared.open(job))

    return shared.admit(queue)


def score_tokens(shared: SharedEngine, tokens: list[int]) -> list[float]:
    """The log-probability of each token but the first. NumericsError where one is not finite."""
    if len(tokens) == 1:
        shared.engine.check_tokens(tokens)
        return []
    job = shared.admit(lambda engine: engine.add_scoring(tokens))
    shared.run([job])
    if job.error is not None:
        raise NumericsError(job.error)
    return job.scores


def complete(job: Job, has_drafts: bool) -> Completion:
    """What a job that has ended came to."""
    return Completion(
        text=job.text if job.stream else None,
        token_ids=job.request.generated,
        finish_reason=job.finish_reason or "",
        logprobs=None if job.params.logprobs is None else job.logprobs,
        selections=job.selections() if isinstance(job.seen, list) else None,
        drafts=job.tally if has_drafts else None,
        error=job.error,
        cached_tokens=job.request.cached_tokens,
        stop_reason=job.stop_reason,
        prompt_logprobs=job.prompt_logprobs,
    )
