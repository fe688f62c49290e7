"""The engine under traffic: requests per second, time to the first token and between tokens, by requests in flight.

No server and no text: clients hand token ids to one engine, and each sends its next request when the last has ended.
Their first requests have other lengths than later ones, so that ends and arrivals soon spread over the steps. Prompts
are random and no request ends early, so every run does the same work. Next: decode.py, single steps.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from saccade.api.settings.step_sizes import BATCH_TOKENS
from saccade.base.values import show, show_count
from saccade.bench.record import Record, find_device, print_table, require_counts, show_run
from saccade.bench.rig import Rig, build_rig, choose_arrangement
from saccade.bench.room import left_out, require_measured, require_room
from saccade.bench.steps.clients import ROUNDS, TrafficTask, measure_arrivals, measure_traffic
from saccade.bench.steps.eager import random_tokens, run_one, shuffle_pages
from saccade.bench.steps.routing import ROUTER, count_distinct
from saccade.engine.engine import Engine
from saccade.engine.graphs import CapturedModel
from saccade.engine.pages import allocate_cache, clear_states, count_cache_bytes, shape_cache
from saccade.engine.params import SamplingParams
from saccade.engine.scheduler import Scheduler
from saccade.engine.steps.ahead import LEAST_DECODES, choose_launch_ahead
from saccade.errors import RequestError
from saccade.kernels import PAGE
from saccade.kernels.types import MIXED_TOKENS
from saccade.models.dsa.transformer import Transformer
from saccade.ops.step import Cache

POISSON = "poisson"
ARRIVALS = ("again", POISSON)
LAUNCHED = {"auto": f"ahead where {LEAST_DECODES} decode", "on": "ahead", "off": "one by one"}
TRAFFIC_COLUMNS = (
    ("clients", "clients", "d"), ("selections", "selections", ""),
    ("prompt", "prompt", "d"), ("output", "output", "d"), ("layers", "layers", "d"),
    ("requests_per_s", "requests/s", ".2f"), ("tokens_per_s", "tokens/s", ".0f"), ("ttft_ms", "first token, ms", ".1f"),
    ("ttft_p99_ms", "99 of 100", ".1f"), ("gap_ms", "between tokens, ms", ".2f"), ("gap_p95_ms", "95 of 100", ".2f"),
    ("gap_p99_ms", "99 of 100", ".2f"),
    ("longest_gap_ms", "longest", ".1f"), ("graphs", "graphs", "d"),
    ("distinct_experts", "experts", ".1f"),
)  # fmt: skip


def bench_engine(
    shape: str = "bundled",
    layers: int | None = None,
    clients: Sequence[int] = (1, 8, 32, 128),
    prompt: int = 64,
    output: int = 256,
    chunk: int | None = None,
    device: str = "auto",
    seed: int = 0,
    commit: str | None = None,
    say: Callable[[str], None] = lambda _: None,
    capture: bool = False,
    arrivals: str = "again",
    load: float = 0.8,
    ahead: str = "auto",
    mixed: int = MIXED_TOKENS,
    experts: str = ROUTER,
    activations: str = "auto",
    temperature: float = 0.0,
    top_p: float = 1.0,
) -> list[Record]:
    """One record for each number of clients. `chunk`: tokens of a step at most (max_batch_tokens); where some requests
    decode beside prompts as many as LLM would have for the shape (max_mixed_tokens). `arrivals`: "again",
    each client asks when its answer has ended; or "poisson", requests come by chance, as many a second as `load` times
    what such clients get done. `ahead`, `mixed`: see Engine and CapturedModel. `capture`:
    a second record of each, in which all selections are captured. `experts`: how tokens choose theirs (routing.py);
    `activations`: as LLM has it.
    `temperature`, `top_p`: of all requests; 0 is greedy."""
    at = find_device(device)
    work = TrafficTask(prompt, output, BATCH_TOKENS[at.type] if chunk is None else chunk)
    work = work._replace(temperature=temperature, top_p=top_p)
    SamplingParams(temperature=temperature, top_p=top_p)  # refuses what no request may ask
    require_counts(prompt=prompt, output=output, chunk=work.chunk, mixed=mixed)
    ahead = choose_launch_ahead(ahead, at.type, "ahead")
    if arrivals not in ARRIVALS:
        raise RequestError(f"arrivals: expected {' or '.join(ARRIVALS)}, found {show(arrivals)}")
    if not 0 < load <= 10:
        raise RequestError(f"load: expected a number above 0 and up to 10, found {show(load)}")
    rig = build_rig(shape, layers, at, seed, with_flash=True, experts=experts, activations=activations)
    config = rig.shape.config
    if prompt + output > config.max_position_embeddings:
        raise RequestError(
            f"prompt and output: expected {config.max_position_embeddings} tokens at most, found {prompt + output}"
        )
    work = work._replace(mixed_chunk=rig.choose_mixed_chunk(work.chunk))
    common: Record = {
        **rig.describe(commit), "prompt": prompt, "output": output, "chunk": work.chunk,
        "mixed_chunk": work.mixed_chunk, "arrivals": arrivals, "load": load if arrivals == POISSON else None,
        "ahead": ahead, "mixed": mixed, "temperature": temperature, "top_p": top_p,
    }  # fmt: skip
    records: list[Record] = []
    for count in clients:
        for captures in (False, True) if capture else (False,):
            with left_out(show_count(count, "client"), at, say):
                each, rate = work._replace(captures=captures), load if arrivals == POISSON else None
                records.append({**common, **measure_clients(rig, count, each, ahead, mixed, rate, seed)})
                say(f"{count} clients: {records[-1]['tokens_per_s']:.0f} tokens/s")
    require_measured(records)
    return records


def measure_clients(
    rig: Rig, count: int, work: TrafficTask, ahead: str, mixed: int, load: float | None, seed: int
) -> Record:
    """One record. `load`: None for clients who ask again. MemoryRefusedError if their cache does not fit."""
    pages = -(-(work.prompt + work.output) // PAGE)
    engine, runner = build_engine(rig, count, work, count * pages + 1, ahead, mixed)
    found = measure_traffic(engine, count, work)
    if load is not None:
        found = measure_arrivals(engine, count, work, load * found["requests_per_s"], seed)
    graphs = runner.count_recorded() if isinstance(runner, CapturedModel) else None
    kept = "captured" if work.captures else "-"
    distinct = count_distinct(rig.see_experts(partial(run_decodes, engine.cache, count, pages, work.prompt)))
    return {"clients": count, "selections": kept, **found, "graphs": graphs, "distinct_experts": distinct}


def run_decodes(cache: Cache, count: int, pages: int, position: int, model: Transformer) -> None:
    """A step in which `count` requests decode at `position`, over what a measurement has left in the cache; requests
    with states, which belong to a position, begin anew."""
    device = cache.latent[0].data.device
    clear_states(cache, range(1, count + 1))
    position = 0 if cache.states else position
    tokens = random_tokens(model.config.vocab_size, count, device)
    run_one(model, cache, tokens, torch.full_like(tokens, position), shuffle_pages(count, pages, device))


def build_engine(
    rig: Rig, count: int, work: TrafficTask, pages: int, ahead: str = "off", mixed: int = MIXED_TOKENS
) -> tuple[Engine, Any]:
    """For `count` requests; and what runs its steps. MemoryRefusedError if its cache does not fit."""
    device, (runner, small) = rig.device, rig.make_runner(choose_arrangement(rig.device), mixed)
    config, dtype = rig.shape.config, rig.plan.dtype
    require_room(count_cache_bytes(shape_cache(config, pages, dtype, mtp=False, requests=count)), device)
    cache = allocate_cache(config, pages, dtype, device, mtp=False, requests=count)
    scheduler = Scheduler(
        pages, work.chunk, count, work.prompt + work.output, max_mixed_tokens=work.mixed_chunk,
        rounds=rig.activations != "exact",
    )  # fmt: skip
    return Engine(runner, cache, scheduler, config.vocab_size, device, small=small, launch_ahead=ahead), runner


def show_engine(records: Sequence[Record]) -> str:
    """The table for people, with the conditions under it."""
    one = records[0]
    chance = f"requests come by chance, Poisson, seed {one['seed']}, {one['load']} of what clients get who ask again"
    return show_run(
        print_table(records, TRAFFIC_COLUMNS),
        one,
        f"steps of {one['chunk']} tokens at most, {one['mixed_chunk']} where some decode beside prompts, launched"
        f" {LAUNCHED[one['ahead']]}, with prompts captured up to {one['mixed']} tokens; {ROUNDS}"
        " answers of each client and more are counted",
        chance if one["arrivals"] == POISSON else None,
        f"tokens drawn at temperature {one['temperature']}, top-p {one['top_p']}" if one["temperature"] else None,
        "experts: distinct ones that a layer reads when all clients decode",
        *show_cost(records),
    )


def show_cost(records: Sequence[Record]) -> list[str]:
    """What captured selections cost, by the tokens a second of neighbours."""
    lines = []
    for plain, captured in zip(records, records[1:], strict=False):
        if (plain["selections"], captured["selections"]) == ("-", "captured"):
            cost = plain["tokens_per_s"] / captured["tokens_per_s"] - 1
            lines.append(f"captured selections cost {cost:.1%} of the time of {plain['clients']} clients")
    return lines
