"""Time to the first token of a prompt: all of it through the engine's prefill path, chunk by chunk, then one choice.

The cache is empty at first, each sample is the whole prompt, and nothing but the last token's logits is computed.
Operations are counted, so that the time stands beside what the arithmetic needs. Next: decode.py.
"""

import statistics
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from saccade.api.settings import BATCH_TOKENS, check_activations
from saccade.bench.bytes import count_operations
from saccade.bench.record import (
    Record,
    describe_run,
    find_device,
    measure_bandwidth,
    print_table,
    require_counts,
    time_samples,
)
from saccade.bench.rig import REFERENCE_ARRANGEMENT, Rig, build_rig, choose_arrangement, require_arrangements
from saccade.bench.steps.eager import Forward, random_tokens, shuffle_pages
from saccade.engine.buffers import Buffers, Run
from saccade.engine.graphs import CapturedModel
from saccade.engine.pages import allocate_cache, clear_states
from saccade.errors import RequestError
from saccade.kernels import PAGE
from saccade.ops.step import Cache
from saccade.parallel.ranks import ONE_RANK, Ranks

PREFILL_COLUMNS = (
    ("arrangement", "arrangement", ""), ("layers", "layers", "d"), ("context", "tokens", "d"), ("chunk", "chunk", "d"),
    ("activations", "activations", ""),
    ("ttft_ms", "ms to first token", ".1f"), ("tera_operations", "TFLOP", ".1f"), ("tflops", "TFLOP/s", ".0f"),
    ("share_of_bandwidth", "of bandwidth", ".1%"),
)  # fmt: skip


class PromptRun:
    """A prompt, and an empty cache for it: its chunks are laid out as an engine does it."""

    def __init__(self, cache: Cache, page_table: Tensor, tokens: Tensor, chunk: int, small: int = 0) -> None:
        """page_table: i64 [1, P]; tokens: i64 [n]; `small`: see Buffers."""
        pages, count = page_table[0].tolist(), len(tokens)
        self.cache, self.runs = cache, list[Run]()
        for start in range(0, count, chunk):
            size = min(chunk, count - start)
            self.runs.append(
                Run(tokens[start : start + size].tolist(), start, pages, int(start + size == count), slot=1)
            )
        self._buffers = Buffers(tokens.device, min(chunk, count), 1, len(pages), small, bool(cache.states))

    @torch.inference_mode()
    def find_logits(self, model: Forward) -> Tensor:
        """[1, vocabulary], of the token after it."""
        clear_states(self.cache, [1])
        for run in self.runs:
            batch = self._buffers.fill([run])
            hidden = model.forward(batch, self.cache)
        return model.logits(hidden[batch.logit_rows])[:1]

    def run(self, model: Forward) -> int:
        """The first token after it, read back."""
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
    activations: str = "exact",
) -> list[Record]:
    """One record for each arrangement and number of tokens. `chunk`: tokens of one step (max_batch_tokens).
    `activations`: what products see of their inputs, as LLM has it."""
    require_counts(chunk=chunk, repeats=repeats)
    at = find_device(device)
    names = list(arrangements) or [choose_arrangement(at)]
    require_arrangements(names, at, ranks, shape)
    check_activations(activations, "auto")
    rig = build_rig(shape, layers, at, seed, ranks=ranks, with_flash=True)
    rig.activations = activations
    config = rig.shape.config
    for context in contexts:
        if not 0 < context <= config.max_position_embeddings:
            raise RequestError(f"context: expected 1 to {config.max_position_embeddings}, found {context}")
    bandwidth = measure_bandwidth(at)
    run = {**describe_run(at, commit), "shape": shape, "layers": config.num_hidden_layers, "notes": rig.shape.notes}
    run |= {"tp": ranks.layout.tp, "ep": ranks.layout.ep}
    records = []
    for context in contexts:
        pages = -(-context // PAGE)
        cache = allocate_cache(config, pages + 1, rig.plan.dtype, at, mtp=False, requests=1)
        table, tokens = shuffle_pages(1, pages, at), random_tokens(config.vocab_size, context, at)
        runners = {name: make_runner(rig, name) for name in names}
        prompts = {name: PromptRun(cache, table, tokens, chunk, small) for name, (_, small) in runners.items()}
        samples: dict[str, list[float]] = {name: [] for name in names}
        # The first run compiles kernels, the second records graphs.
        firsts = {name: {prompts[name].run(model) for _ in range(2)} for name, (model, _) in runners.items()}
        for _ in range(repeats):
            for name, (model, _) in runners.items():
                find = partial(prompts[name].run, model)
                samples[name] += time_samples(lambda: firsts[name].add(find()), at, 1)  # noqa: B023
            say(f"{context} tokens: {', '.join(f'{name} {samples[name][-1]:.1f} ms' for name in names)}")
        operations = count_operations(config, context, ranks.layout)
        for name in names:
            seconds = statistics.median(samples[name]) * 1e-3
            moved = rig.plan.device_bytes * -(-context // chunk)
            records.append({
                **run,
                "arrangement": name,
                "batch": 1,
                "context": context,
                "chunk": chunk,
                "activations": activations,
                "ttft_ms": seconds * 1e3,
                "samples_ms": samples[name],
                "operations": operations,
                "tera_operations": sum(operations.values()) / 1e12,
                "tflops": sum(operations.values()) / seconds / 1e12,
                "bytes": moved,  # all weights once a chunk
                "read_bandwidth_gb_s": bandwidth / 1e9,
                "share_of_bandwidth": moved / seconds / bandwidth,
                "same_tokens_every_time": len(firsts[name]) == 1,
                "graphs": model.count_recorded() if isinstance(model := runners[name][0], CapturedModel) else None,
                "start_s": rig.seconds,
                "seed": seed,
            })  # fmt: skip
    return records


def make_runner(rig: Rig, name: str) -> tuple[Forward, int]:
    """What an engine runs the arrangement with, and up to how many tokens its steps have few shapes."""
    model = rig.make_model(name)
    if rig.device.type != "cuda" or name == REFERENCE_ARRANGEMENT:
        return model, 0
    captured = CapturedModel(model)
    return captured, captured.small


def show_prefill(records: Sequence[Record]) -> str:
    """The table for people, with the conditions under it."""
    one = records[0]
    spread = ", ".join(f"{min(r['samples_ms']):.1f} to {max(r['samples_ms']):.1f}" for r in records)
    return "\n".join([
        print_table(records, PREFILL_COLUMNS),
        f"{one['shape']} ({'; '.join(one['notes']) or 'whole'}), synthetic weights, an empty cache",
        f"{one['device']}, reads {one['read_bandwidth_gb_s']:.0f} GB/s; torch {one['torch']}",
        f"samples, ms: {spread}",
        one["command"],
    ])  # fmt: skip
