"""Time per token of whole decode steps, against the bytes that a step must move.

A step is everything: forward, logits, greedy choice, tokens fed back. Weights are made once; batches, contexts and
arrangements run one after the other on them, arrangements of one batch and context in turn, so that a warm or a slow
moment meets all of them. Next: bytes.py for the limit, plot.py for one layer.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch

from saccade.api.loading.machine import make_drafter
from saccade.bench.bytes import HELD, PACKED_FP8, SMALLEST, Storage, count_bytes, expect_experts
from saccade.bench.plot import Bar, draw_layer, list_layer
from saccade.bench.profile import time_communication, time_kernels
from saccade.bench.record import (
    Record,
    find_device,
    measure_bandwidth,
    prepare_file,
    print_table,
    require_counts,
    show_run,
    time_samples,
)
from saccade.bench.rig import Rig, build_rig, choose_arrangement, require_arrangements
from saccade.bench.room import left_out, require_measured, require_room
from saccade.bench.shapes import FLASH_SHAPES
from saccade.bench.steps.drafting import DraftSteps, describe_drafts, require_drafts, show_drafts
from saccade.bench.steps.eager import Steps, random_tokens, run_one, shuffle_pages
from saccade.bench.steps.fill import fill_caches, prefill_requests
from saccade.bench.steps.routing import ROUTER, count_distinct, require_recording
from saccade.engine.pages import allocate_cache, count_cache_bytes, shape_cache
from saccade.errors import RequestError
from saccade.kernels import PAGE
from saccade.models.cache_rows import check_caches
from saccade.parallel.ranks import ONE_RANK, Ranks

L2_BYTES = 60e6  # of an H200; an H100 has 50
STORAGE = {"packed-fp8": PACKED_FP8, "separate-fp8": PACKED_FP8}  # of an arrangement's weights; the others: HELD


class How(NamedTuple):
    """How to measure, the same for every batch and context."""

    steps: int  # of a sample
    repeats: int  # samples
    is_real: bool  # whether caches hold rows of a prefill
    index_cache: str
    latent_cache: str
    recording: str | None  # where to write which experts were chosen
    drafts: Sequence[int]  # of steps that are measured beside plain ones
    say: Callable[[str], None]


DECODE_COLUMNS = (
    ("arrangement", "arrangement", ""), ("layers", "layers", "d"), ("batch", "batch", "d"), ("context", "context", "d"),
    ("tpot_ms", "ms a token", ".3f"), ("limit_ms", "limit ms", ".3f"), ("share_of_bandwidth", "of bandwidth", ".1%"),
    ("gb_per_step", "GB a step", ".3f"), ("us_per_layer", "us a layer", ".1f"), ("kernels_per_step", "kernels", "d"),
    ("distinct_experts", "experts", ".1f"),
)  # fmt: skip


def bench_decode(
    shape: str = "v32-rank-of-8",
    layers: int | None = None,
    batches: Sequence[int] = (1,),
    contexts: Sequence[int] = (8192,),
    arrangements: Sequence[str] = (),
    steps: int = 20,
    repeats: int = 7,
    device: str = "auto",
    random_cache: bool = False,
    seed: int = 0,
    commit: str | None = None,
    index_cache: str = "bf16",
    latent_cache: str = "bf16",
    plot: str | None = None,
    drafts: Sequence[int] = (),
    experts: str = ROUTER,
    record_experts: str | None = None,
    say: Callable[[str], None] = lambda _: None,
    ranks: Ranks = ONE_RANK,
) -> list[Record]:
    """One record for each arrangement, batch and context. `random_cache`: caches hold random rows instead of
    those of a prefill.

    `plot`: where to draw one layer of the first record. `drafts`: also measure steps that verify and make so many, in
    the first arrangement. `experts`: how tokens choose theirs, `record_experts`: where to write which those were
    (routing.py). `say` is told what is left out, and why. RequestError before anything is allocated if the request
    makes no sense.
    """
    require_counts(steps=steps, repeats=repeats)
    prepare_file("plot", plot)
    require_recording(record_experts, len(batches) * len(contexts))
    check_caches(index_cache, latent_cache)
    at = find_device(device)
    names = list(arrangements) or [choose_arrangement(at)]
    require_arrangements(names, at, ranks, shape)
    for context in contexts:
        require_drafts(drafts, context)
    if drafts and shape in FLASH_SHAPES and steps < 2 * max(drafts):
        raise RequestError(f"steps: expected {2 * max(drafts)} or more, as far as drafts reach, found {steps}")
    rig = build_rig(shape, layers, at, seed, bool(drafts), ranks, with_flash=True, experts=experts)
    most = rig.shape.config.max_position_embeddings
    for context in contexts:
        if not steps < context <= most:
            raise RequestError(f"context: expected {steps + 1} (more than the steps) to {most}, found {context}")
    bandwidth = measure_bandwidth(at)
    common = {**rig.describe(commit), "read_bandwidth_gb_s": bandwidth / 1e9, "steps_per_sample": steps}
    records: list[Record] = []
    how = How(steps, repeats, not random_cache, index_cache, latent_cache, record_experts, drafts, say)
    for context in contexts:
        for batch in batches:
            with left_out(f"batch {batch} at context {context}", at, say, ranks):
                found = measure_decode(rig, names, batch, context, how, plot is not None and not records)
                records += [{**common, **finish_record(rig, r, bandwidth)} for r in found]
    require_measured(records)
    if plot is not None:
        draw_picture(records[0], plot, say)
    return records


@torch.inference_mode()
def measure_decode(
    rig: Rig, names: Sequence[str], batch: int, context: int, how: How, is_profiled: bool
) -> list[Record]:
    """All arrangements at one batch and context, in turn. MemoryRefusedError if their caches do not fit."""
    config, device, steps = rig.shape.config, rig.device, how.steps
    pages = -(-context // PAGE)
    size, mtp = batch * pages + 1, bool(how.drafts)
    needed = count_cache_bytes(
        shape_cache(config, size, rig.plan.dtype, mtp, how.index_cache, batch, latent_cache=how.latent_cache)
    )
    require_room(needed, device, rig.ranks)
    cache = allocate_cache(
        config, size, rig.plan.dtype, device, mtp, how.index_cache, batch, latent_cache=how.latent_cache
    )
    table = shuffle_pages(batch, pages, device)
    if cache.states:
        filled = prefill_requests(rig.make_model(names[0]), config, cache, table, context - steps)
    else:
        filled = fill_caches(cache, table, context, rig.make_rows(context) if how.is_real else None)
    tokens = random_tokens(config.vocab_size, batch, device)
    first = torch.full((batch,), context - steps, device=device)  # the last step sees `context` tokens
    watched = partial(run_one, cache=cache, tokens=tokens, positions=first, page_table=table)
    experts = count_distinct(rig.see_experts(watched, how.recording))
    how.say(f"batch {batch}, context {context}: cache filled, {experts or 0:.1f} distinct experts a layer")

    drafting: dict[str, Steps] = {}
    for count in how.drafts:  # before other steps change the states
        continued = context - steps if cache.states else None
        drafter = make_drafter(rig.make_model(names[0]))
        drafting[f"{count} drafts"] = DraftSteps(drafter, cache, table, context, count, config.vocab_size, continued)
    ready: dict[str, Steps] = {}
    begun = {}
    for name in names:
        start = time.perf_counter()
        ready[name] = rig.make_steps(name, cache, batch, pages)
        ready[name].load(tokens, first, table)
        for _ in range(min(3, steps)):
            ready[name].run()
        ready[name].tokens.cpu()
        begun[name] = time.perf_counter() - start
    ready |= drafting
    samples: dict[str, list[float]] = {name: [] for name in ready}
    ends: dict[str, set[tuple[int, ...]]] = {name: set() for name in ready}
    for _ in range(how.repeats):
        for name, step in ready.items():
            step.load(tokens, first, table)
            samples[name] += time_samples(step.run, device, 1, steps)
            ends[name].add(tuple(step.tokens.tolist()))
    records: list[Record] = [
        {
            "arrangement": name,
            "batch": batch,
            "context": context,
            "tpot_ms": statistics.median(samples[name]),
            "samples_ms": samples[name],
            "kernels_per_step": ready[name].kernels,
            "distinct_experts": experts,
            "expected_experts": None if experts is None else expect_experts(config, batch),
            "same_tokens_every_time": len(ends[name]) == 1,
            "cache": filled,
            "index_cache": how.index_cache,
            "latent_cache": how.latent_cache,
            "start_s": {**rig.seconds, "capture_s": begun[name]},
        }
        for name in names
    ]
    for count in how.drafts:
        name = f"{count} drafts"
        found = describe_drafts(config, records[0], count, samples[name], statistics.median(samples[name]))
        found |= {"kernels": ready[name].kernels, "same_tokens_every_time": len(ends[name]) == 1}
        records[0].setdefault("speculate", []).append(found)
    if rig.ranks.layout.tp > 1:
        ready[names[0]].load(tokens, first, table)
        records[0]["communication"] = time_communication(ready[names[0]].run, device, min(6, steps - 1))
    if is_profiled:
        ready[names[0]].load(tokens, first, table)
        records[0]["layer_kernels"] = time_layer(ready[names[0]], rig, records[0], min(6, steps - 1))
    return records


def finish_record(rig: Rig, record: Record, bandwidth: float) -> Record:
    """A record with what follows from its time: bytes, limits, shares."""
    config, batch, context = rig.shape.config, record["batch"], record["context"]
    storage = find_storage(record)._replace(layout=rig.ranks.layout)
    counted = count_bytes(config, batch, context, record["distinct_experts"], storage)
    moved, seconds = sum(counted.values()), record["tpot_ms"] * 1e-3
    smallest = SMALLEST._replace(layout=rig.ranks.layout)
    least = sum(count_bytes(config, batch, context, record["distinct_experts"], smallest).values())
    ends = counted["lm_head"] + counted["embed_tokens"] + counted["norm"]
    kernels = record["kernels_per_step"]
    return {
        **record,
        "bytes_per_step": moved,
        "gb_per_step": moved / 1e9,
        "bytes_by_matrix": counted,
        "limit_ms": moved / bandwidth * 1e3,
        "limit_ms_all_fp8": least / bandwidth * 1e3,
        "share_of_bandwidth": moved / seconds / bandwidth,
        "tokens_per_s": batch / seconds,
        "kernels_per_layer": None if kernels is None else kernels / config.num_hidden_layers,
        # Without embedding and head, which are taken to be at their limit.
        "us_per_layer": (seconds - ends / bandwidth) * 1e6 / config.num_hidden_layers,
        "weights_are": "cold: a step reads more than the L2 cache holds" if moved > 3 * L2_BYTES else "warm in L2",
    }


def show_communication(record: Record) -> str:
    """What the ranks' messages cost a step."""
    found, step = record["communication"], record["tpot_ms"] * 1e3
    return (
        f"batch {record['batch']}, context {record['context']}, {record['tp']} ranks: {found['messages']} messages take"
        f" {found['us']:.0f} us of a step's {step:.0f} ({found['us'] / step:.0%}), waiting for other ranks included"
    )


def find_storage(record: Record) -> Storage:
    storage = STORAGE.get(record["arrangement"], HELD)
    return storage._replace(index_cache=record["index_cache"], latent_cache=record["latent_cache"])


def time_layer(steps: Steps, rig: Rig, record: Record, runs: int) -> list[Bar]:
    """The kernels of one layer of a loaded step, with their times and bytes; [] if the profiler cannot tell."""
    if runs < 1:
        return []
    kernels = time_kernels(steps.run, rig.device, runs)
    storage = find_storage(record)
    return list_layer(
        kernels, rig.shape.config, record["batch"], record["context"], record["distinct_experts"], storage
    )


def draw_picture(record: Record, path: str, say: Callable[[str], None]) -> None:
    """The layer of a record as a picture at `path`; only said if its kernels could not be timed."""
    if not record["layer_kernels"]:
        say("no picture: the profiler saw no kernels, or not the same ones in every step")
        return
    title = f"{record['shape']}, one layer of a decode step, batch {record['batch']}, context {record['context']}"
    with open(path, "w") as file:
        file.write(draw_layer(record["layer_kernels"], record["read_bandwidth_gb_s"] * 1e9, title))


def show_decode(records: Sequence[Record]) -> str:
    """The table for people, with the conditions under it."""
    one = records[0]
    spread = ", ".join(f"{min(r['samples_ms']):.3f} to {max(r['samples_ms']):.3f}" for r in records)
    notes = [f"weights {one['weights_are']}"]
    notes += [show_communication(r) for r in records if r.get("communication")]
    notes += [f"cache: {text}" for text in dict.fromkeys(r["cache"] for r in records)]
    notes.append(f"latents in {one['latent_cache']}, index keys in {one['index_cache']}")
    notes.append(f"samples, ms: {spread}; {one['steps_per_sample']} steps each")
    notes += [line for r in records for line in show_drafts(r)]
    for name, us, nbytes in one.get("layer_kernels", ()):
        notes.append(f"  {name:36} {us:7.2f} us {nbytes / 1e6:8.2f} MB")
    if not all(r["same_tokens_every_time"] for record in records for r in (record, *record.get("speculate", ()))):
        notes.append("WARNING: repeated runs chose different tokens")
    return show_run(print_table(records, DECODE_COLUMNS), one, *notes)
