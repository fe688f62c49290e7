"""What a step costs the host: an engine whose model computes nothing, under clients that ask again and again.

Hidden states are zeros and logits a table of few columns, so that what is left is scheduling, laying out
the batch, choosing, detokenizing and bookkeeping, and the launches of all this. On a CPU the choice itself is in it,
over 64 tokens. Prompts are random and texts are those of the bundled tokenizer. Next: traffic.py, the same
clients before a model.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from random import Random
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saccade.api.settings.step_sizes import BATCH_TOKENS
from saccade.base.values import show_count
from saccade.bench.record import Record, describe_run, find_device, print_table, require_counts, show_run
from saccade.bench.room import left_out, require_measured
from saccade.bench.steps.clients import Client, TrafficTask, find_late
from saccade.checkpoint.open import bundled_path
from saccade.engine.engine import Engine
from saccade.engine.graphs import MOST_CAPTURED
from saccade.engine.params import SamplingParams
from saccade.engine.scheduler import Scheduler
from saccade.engine.scheduling.prefix_keys import PrefixKeys, make_root
from saccade.kernels import PAGE
from saccade.ops.step import Batch, Cache
from saccade.text.tokenizer import Tokenizer

HOST_VOCABULARY = 64  # columns of logits: on a CPU more of them would be measured instead of the host
TABLES = 8  # of logits, in turn: answers are not one token again and again


class HostAnswer(NamedTuple):
    """What the clients of one measurement want."""

    name: str
    has_text: bool
    params: SamplingParams


def list_answers(output: int) -> list[HostAnswer]:
    greedy = SamplingParams(max_tokens=output, temperature=0.0, ignore_eos=True)
    sampled = SamplingParams(max_tokens=output, temperature=0.8, top_p=0.95, ignore_eos=True)
    return [
        HostAnswer("token ids", False, greedy),
        HostAnswer("text", True, greedy),
        HostAnswer("sampled", True, sampled),
    ]


class NoModel:
    """A model of no work. See `Runner`."""

    ops: Any = None

    def __init__(self, rows: int, tokens: int, device: torch.device) -> None:
        dice = torch.Generator().manual_seed(0)
        self._tables = torch.rand(TABLES, rows, HOST_VOCABULARY, generator=dice).to(device)
        self._hidden = torch.zeros(tokens, 1, device=device)
        self._turn = 0

    def forward(self, batch: Batch, cache: Cache, capture: list[Tensor] | None = None) -> Tensor:
        return self._hidden[: len(batch.tokens)]

    def logits(self, rows: Tensor) -> Tensor:
        self._turn = (self._turn + 1) % TABLES
        return self._tables[self._turn, : len(rows)]


def bench_host(
    clients: Sequence[int] = (1, 16, 64, 256),
    prompt: int = 64,
    output: int = 256,
    chunk: int | None = None,
    device: str = "auto",
    seed: int = 0,
    commit: str | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> list[Record]:
    """One record for each number of clients and kind of answer."""
    at = find_device(device)
    require_counts(prompt=prompt, output=output)
    work = TrafficTask(prompt, output, BATCH_TOKENS["cuda"] if chunk is None else chunk)
    common = {**describe_run(at, commit), "prompt": prompt, "output": output, "chunk": work.chunk, "seed": seed}
    records: list[Record] = []
    for count in clients:
        with left_out(show_count(count, "client"), at, say):
            for answer in list_answers(output):
                records.append({**common, **measure_host(at, count, work, answer, seed)})
                say(f"{count} clients, {answer.name}: {records[-1]['decode_ms']:.3f} ms")
    require_measured(records)
    return records


def measure_host(device: torch.device, count: int, work: TrafficTask, answer: HostAnswer, seed: int) -> Record:
    engine = build_idle_engine(device, count, work, answer.has_text)
    callers = [Client(engine, work, Random(seed + i), answer.params) for i in range(count)]
    owners = {caller.job.request: caller for caller in callers}
    decodes, mixed, busy = list[float](), list[float](), list[float]()
    ended = 0
    while ended < 3 * count:
        is_mixed = bool(engine.scheduler.waiting)
        begun, worked = time.perf_counter(), time.thread_time()
        updates = engine.step()
        now = time.perf_counter()
        if ended >= count and not is_mixed:
            busy.append(1e3 * (time.thread_time() - worked))
        if ended >= count:
            (mixed if is_mixed else decodes).append(1e3 * (now - begun))
        for update in updates:
            caller = owners.pop(update.job.request)
            caller.take(len(update.tokens), now)
            owners[caller.job.request] = caller
        ended = sum(caller.ended for caller in callers)
    return {
        "clients": count, "answers": answer.name, "decode_steps": len(decodes), "decode_ms": statistics.median(decodes),
        "decode_cpu_ms": statistics.median(busy), "decode_p99_ms": find_late(decodes), "mixed_steps": len(mixed),
        "mixed_ms": statistics.median(mixed or [0.0]),
    }  # fmt: skip


def build_idle_engine(device: torch.device, count: int, work: TrafficTask, has_text: bool) -> Engine:
    """With a prefix cache, as an LLM has it."""
    length = work.prompt + work.output
    pages = 2 * count * -(-length // PAGE) + 1
    scheduler = Scheduler(pages, work.chunk, count, length, PrefixKeys(make_root("host")))
    small = MOST_CAPTURED if device.type == "cuda" else 0
    tokenizer = Tokenizer.load(bundled_path()) if has_text else None
    rows = max(work.chunk, count)
    model = NoModel(rows, 2 * rows, device)
    return Engine(model, Cache((), ()), scheduler, HOST_VOCABULARY, device, tokenizer=tokenizer, small=small)


HOST_COLUMNS = (
    ("clients", "clients", "d"), ("answers", "answers", ""), ("decode_ms", "a decode step, ms", ".3f"),
    ("decode_cpu_ms", "on the CPU", ".3f"), ("decode_p99_ms", "99 of 100", ".3f"), ("decode_steps", "steps", "d"),
    ("mixed_ms", "with a prompt, ms", ".3f"), ("mixed_steps", "steps", "d"),
)  # fmt: skip


def show_host(records: Sequence[Record]) -> str:
    """The table for people, with the conditions under it."""
    one = records[0]
    return show_run(
        print_table(records, HOST_COLUMNS),
        one,
        f"the host's share of a step: a model that computes nothing, {HOST_VOCABULARY} tokens to choose from, medians",
        f"prompts of {one['prompt']} tokens, answers of {one['output']}, steps of {one['chunk']} tokens at most",
    )
