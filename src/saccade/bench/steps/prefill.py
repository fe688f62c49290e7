"""Time to the first token of a prompt: all of it through the engine's prefill path, chunk by chunk, then one choice.

The cache is empty at first, each sample is the whole prompt, and nothing but the last token's logits is computed.
Operations are counted, so that the time stands beside what the arithmetic needs. Next: decode.py.
"""

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from saccade.api.settings.step_sizes import BATCH_TOKENS
from saccade.bench.bytes import count_operations
from saccade.bench.record import (
    Record,
    find_device,
    measure_bandwidth,
    print_table,
    require_counts,
    show_run,
    time_samples,
)
from saccade.bench.rig import Rig, build_rig, choose_arrangement, require_arrangements
from saccade.bench.room import left_out, require_measured, require_room
from saccade.bench.steps.eager import Forward, prefill, random_tokens, shuffle_pages
from saccade.bench.steps.routing import ROUTER, count_distinct, require_recording
from saccade.engine.buffers import Buffers, Run
from saccade.engine.graphs import CapturedModel
from saccade.engine.pages import allocate_cache, clear_states, count_cache_bytes, shape_cache
from saccade.engine.scheduling.step_kinds import EXACT_PROMPT
from saccade.errors import RequestError
from saccade.kernels import PAGE
from saccade.ops.step import Cache
from saccade.parallel.ranks import ONE_RANK, Ranks

PREFILL_COLUMNS = (
    ("arrangement", "arrangement", ""), ("layers", "layers", "d"), ("context", "tokens", "d"), ("chunk", "chunk", "d"),
    ("activations", "activations", ""),
    ("ttft_ms", "ms to first token", ".1f"), ("tera_operations", "TFLOP", ".1f"), ("tflops", "TFLOP/s", ".0f"),
    ("share_of_bandwidth", "of bandwidth", ".1%"), ("distinct_experts", "experts", ".1f"),
)  # fmt: skip


class PromptRun:
    """A prompt and a cache for it, whose chunks are laid out as by an engine."""

    def __init__(self, cache: Cache, page_table: Tensor, tokens: Tensor, chunk: int, small: int = 0) -> None:
        """page_table: i64 [1, P]; tokens: i64 [n]; `small`: see Buffers."""
        pages, count = page_table[0].tolist(), len(tokens)
        self._rounds = count > EXACT_PROMPT
        self.cache, self.runs = cache, list[Run]()
        for start in range(0, count, chunk):
            size = min(chunk, count - start)
            self.runs.append(
                Run(tokens[start : start + size].tolist(), start, pages, int(start + size == count), slot=1)
            )
        self._buffers = Buffers(tokens.device, min(chunk, count), 1, len(pages), small, bool(cache.states))

    @torch.inference_mode()
    def find_logits(self, model: Forward) -> Tensor:
        """Logits of the token after the prompt, [1, vocabulary]."""
        clear_states(self.cache, [1])
        for run in self.runs:
            batch = self._buffers.fill([run], rounds=self._rounds)
            hidden = model.forward(batch, self.cache)
        return model.logits(hidden[batch.logit_rows])[:1]

    def run(self, model: Forward) -> int:
        """The likeliest token after the prompt, read back."""
        return int(self.find_logits(model).argmax())


def bench_prefill(
    shape: str = "v32-rank-of-8",
    layers: int | None = None,
    contexts: Sequence[int] = (8192,),
    arrangements: Sequence[str] = (),
    chunk: int = BATCH_TOKENS["cuda"],
    repeats: int = 5,
    device: str = "auto",
    seed: int = 0,
    commit: str | None = None,
    say: Callable[[str], None] = lambda _: None,
    ranks: Ranks = ONE_RANK,
    activations: str = "auto",
    experts: str = ROUTER,
    record_experts: str | None = None,
) -> list[Record]:
    """One record for each arrangement and number of tokens. `chunk`: tokens of one step (max_batch_tokens).
    `activations`: what products see of their inputs, as LLM has it. `experts`, `record_experts`: see bench_decode."""
    require_counts(chunk=chunk, repeats=repeats)
    require_recording(record_experts, len(contexts))
    at = find_device(device)
    names = list(arrangements) or [choose_arrangement(at)]
    require_arrangements(names, at, ranks, shape)
    rig = build_rig(shape, layers, at, seed, ranks=ranks, with_flash=True, experts=experts, activations=activations)
    most = rig.shape.config.max_position_embeddings
    for context in contexts:
        if not 0 < context <= most:
            raise RequestError(f"context: expected 1 to {most}, found {context}")
    bandwidth = measure_bandwidth(at)
    common = {**rig.describe(commit), "read_bandwidth_gb_s": bandwidth / 1e9, "batch": 1, "chunk": chunk}
    how = PrefillHow(chunk, repeats, record_experts, say)
    records: list[Record] = []
    for context in contexts:
        with left_out(f"{context} tokens", at, say, ranks):
            found = measure_prefill(rig, names, context, how)
            records += [{**common, **finish_prefill(rig, r, bandwidth, chunk)} for r in found]
    require_measured(records)
    return records


class PrefillHow(NamedTuple):
    """How to measure, the same for every context."""

    chunk: int
    repeats: int  # samples
    recording: str | None  # where to write which experts were chosen
    say: Callable[[str], None]


def measure_prefill(rig: Rig, names: Sequence[str], context: int, how: PrefillHow) -> list[Record]:
    """All arrangements at one number of tokens, in turn. MemoryRefusedError if their cache does not fit."""
    config, at = rig.shape.config, rig.device
    pages = -(-context // PAGE)
    require_room(
        count_cache_bytes(shape_cache(config, pages + 1, rig.plan.dtype, mtp=False, requests=1)), at, rig.ranks
    )
    cache = allocate_cache(config, pages + 1, rig.plan.dtype, at, mtp=False, requests=1)
    table, tokens = shuffle_pages(1, pages, at), random_tokens(config.vocab_size, context, at)
    clear_states(cache, [1])
    # Run without the rows that fill a step up to its bucket: they choose experts, too.
    watched = partial(prefill, cache=cache, tokens=tokens, page_table=table, chunk=how.chunk)
    seen = rig.see_experts(watched, how.recording)
    runners = {name: rig.make_runner(name) for name in names}
    prompts = {name: PromptRun(cache, table, tokens, how.chunk, small) for name, (_, small) in runners.items()}
    samples: dict[str, list[float]] = {name: [] for name in names}
    # The first run compiles kernels, the second records graphs.
    firsts = {name: {prompts[name].run(model) for _ in range(2)} for name, (model, _) in runners.items()}
    for _ in range(how.repeats):
        for name, (model, _) in runners.items():
            find = partial(prompts[name].run, model)
            samples[name] += time_samples(lambda: firsts[name].add(find()), at, 1)  # noqa: B023
        how.say(f"{context} tokens: {', '.join(f'{name} {samples[name][-1]:.1f} ms' for name in names)}")
    return [
        {
            "arrangement": name,
            "context": context,
            "ttft_ms": statistics.median(samples[name]),
            "samples_ms": samples[name],
            "distinct_experts": count_distinct(seen),
            "same_tokens_every_time": len(firsts[name]) == 1,
            "graphs": model.count_recorded() if isinstance(model, CapturedModel) else None,
            "start_s": rig.seconds,
        }
        for name, (model, _) in runners.items()
    ]


def finish_prefill(rig: Rig, record: Record, bandwidth: float, chunk: int) -> Record:
    """A record with what follows from its time: operations, bytes, shares."""
    operations = count_operations(rig.shape.config, record["context"], rig.ranks.layout)
    moved, seconds = rig.plan.device_bytes * -(-record["context"] // chunk), record["ttft_ms"] * 1e-3
    return {
        **record,
        "operations": operations,
        "tera_operations": sum(operations.values()) / 1e12,
        "tflops": sum(operations.values()) / seconds / 1e12,
        "bytes": moved,  # all weights once a chunk
        "share_of_bandwidth": moved / seconds / bandwidth,
    }


def show_prefill(records: Sequence[Record]) -> str:
    """The table for people, with the conditions under it."""
    spread = ", ".join(f"{min(r['samples_ms']):.1f} to {max(r['samples_ms']):.1f}" for r in records)
    notes = ["an empty cache", f"samples, ms: {spread}"]
    if not all(r["same_tokens_every_time"] for r in records):
        notes.append("WARNING: repeated runs chose different tokens")
    return show_run(print_table(records, PREFILL_COLUMNS), records[0], *notes)
