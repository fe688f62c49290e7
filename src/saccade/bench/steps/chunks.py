"""A long prompt beside requests that decode: how long those wait for a token, by the tokens of such a step.

A step holds a chunk of the prompt and a token of each decode, max_mixed_tokens in all. Large chunks bring the prompt's
first token soon, small ones the decodes' next. Next: traffic.py, requests that come and go.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from random import Random

from saccade.api.settings.step_sizes import BATCH_TOKENS
from saccade.bench.record import Record, find_device, print_table, require_counts, show_run
from saccade.bench.rig import Rig, build_rig
from saccade.bench.room import left_out, require_measured
from saccade.bench.steps.clients import TrafficTask
from saccade.bench.steps.eager import prefill, random_tokens, shuffle_pages
from saccade.bench.steps.routing import ROUTER, count_distinct
from saccade.bench.steps.traffic import build_engine
from saccade.engine.engine import Engine
from saccade.engine.pages import clear_states
from saccade.engine.params import SamplingParams
from saccade.errors import RequestError
from saccade.kernels import PAGE

CHUNKS_COLUMNS = (
    ("mixed_chunk", "tokens of a step", "d"), ("decodes", "decodes", "d"), ("context", "prompt", "d"),
    ("layers", "layers", "d"), ("ttft_ms", "first token, ms", ".1f"), ("steps", "steps", "d"),
    ("longest_gap_ms", "longest gap, ms", ".1f"), ("alone_ms", "gap without it", ".2f"),
    ("distinct_experts", "experts", ".1f"),
)  # fmt: skip
SHORT = 32  # tokens of the decodes' own prompts
STEADY = 10  # steps of decodes alone that are timed
UNCOUNTED = 2  # prompts: kernels are compiled in the first, graphs captured in the second


def bench_chunks(
    shape: str = "v32-rank-of-8",
    layers: int | None = None,
    chunks: Sequence[int | None] = (None, 256, 1024, 4096),
    decodes: int = 8,
    context: int = 8192,
    repeats: int = 3,
    device: str = "auto",
    seed: int = 0,
    commit: str | None = None,
    say: Callable[[str], None] = lambda _: None,
    experts: str = ROUTER,
    activations: str = "auto",
) -> list[Record]:
    """One record for each number of tokens in a step that has decodes in it (max_mixed_tokens); None: as many as LLM
    would have. Other steps have LLM's max_batch_tokens, or such a number if that is more. `context`: tokens of the
    prompt. `experts`: how tokens choose theirs (routing.py). `activations`: as LLM has it."""
    at = find_device(device)
    require_counts(decodes=decodes, context=context, repeats=repeats)
    least = min(chunk or BATCH_TOKENS[at.type] for chunk in chunks)
    if least < 2 * decodes:
        raise RequestError(
            f"chunk: expected twice {decodes} decodes at least, half of each step being the prompt's, found {least}"
        )
    rig = build_rig(shape, layers, at, seed, with_flash=True, experts=experts, activations=activations)
    config = rig.shape.config
    if context + 1 > config.max_position_embeddings:
        raise RequestError(f"context: expected at most {config.max_position_embeddings - 1}, found {context}")
    whole = BATCH_TOKENS[at.type]
    usual = rig.choose_mixed_chunk(whole)
    common = {**rig.describe(commit), "decodes": decodes, "context": context, "default_mixed_chunk": usual}
    records: list[Record] = []
    for chunk in (usual if given is None else given for given in chunks):
        # Decodes must outlast every prompt: each step of it is a token of theirs, and half a step is its at least.
        output = (UNCOUNTED + repeats) * (STEADY + 2 + -(-2 * context // chunk))
        if SHORT + output > config.max_position_embeddings:
            raise RequestError(f"chunk: {chunk} tokens of a step leave no room for decodes beside {context} tokens")
        with left_out(f"steps of {chunk} tokens", at, say):
            work = TrafficTask(max(context, SHORT), output, max(chunk, whole), mixed_chunk=chunk)
            found = measure_chunk(rig, work, decodes, context, repeats, seed)
            records.append({**common, "chunk": work.chunk, "mixed_chunk": chunk, **found})
            say(f"steps of {chunk}: longest gap {found['longest_gap_ms']:.1f} ms")
    require_measured(records)
    return records


def measure_chunk(rig: Rig, work: TrafficTask, decodes: int, context: int, repeats: int, seed: int) -> Record:
    """One record. MemoryRefusedError if the cache does not fit."""
    prompt_pages = -(-(context + 1) // PAGE)
    pages = decodes * -(-(SHORT + work.output) // PAGE) + prompt_pages + 1
    engine, _ = build_engine(rig, decodes + 1, work, pages)
    found = measure_beside(engine, decodes, context, work.output, repeats, Random(seed))
    chunk = work.mixed_chunk or work.chunk
    # A step of a prompt alone; the decodes beside it are some tokens of as many.
    tokens = random_tokens(engine.vocab_size, min(chunk, context), rig.device)
    table = shuffle_pages(1, prompt_pages, rig.device)
    clear_states(engine.cache, [1])
    watched = partial(prefill, cache=engine.cache, tokens=tokens, page_table=table, chunk=chunk)
    return {**found, "distinct_experts": count_distinct(rig.see_experts(watched))}


def measure_beside(engine: Engine, decodes: int, context: int, output: int, repeats: int, dice: Random) -> Record:
    """`decodes` requests answer all the time; prompts come one after the other. The first ones are not counted. Medians
    over the others."""

    def ask(prompt: int, tokens: int) -> object:
        text = [dice.randrange(engine.vocab_size) for _ in range(prompt)]
        return engine.add(text, SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)).request

    for _ in range(decodes):
        ask(SHORT, output)
    while any(request.pending != 1 for request in engine.jobs):
        engine.step()
    longest, firsts, alone, counts = list[float](), list[float](), list[float](), list[int]()
    for _ in range(UNCOUNTED + repeats):
        last = time.perf_counter()
        for _ in range(STEADY):
            engine.step()
        alone.append((time.perf_counter() - last) / STEADY)
        begun = last = time.perf_counter()
        prompt, gaps = ask(context, 1), list[float]()
        while prompt in engine.jobs:
            engine.step()
            now = time.perf_counter()
            gaps.append(now - last)
            last = now
        firsts.append(last - begun)
        longest.append(max(gaps))
        counts.append(len(gaps))
    for job in list(engine.jobs.values()):
        engine.cancel(job)
    middle = {
        name: 1e3 * statistics.median(times[UNCOUNTED:])
        for name, times in (("ttft_ms", firsts), ("longest_gap_ms", longest), ("alone_ms", alone))
    }
    return {**middle, "steps": counts[-1]}


def show_chunks(records: Sequence[Record]) -> str:
    """The table for people, with the conditions under it."""
    one = records[0]
    return show_run(
        print_table(records, CHUNKS_COLUMNS),
        one,
        f"{one['decodes']} requests decode while a prompt of {one['context']} tokens enters; each gets a token in each"
        " step",
        f"tokens of a step: of one with decodes in it (max_mixed_tokens); LLM has {one['default_mixed_chunk']} for this"
        f" shape, and {one['chunk']} in other steps",
        "experts: distinct ones that a layer reads in a step of the prompt",
    )
