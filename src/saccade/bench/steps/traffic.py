"""The engine under traffic: requests per second, time to the first token and between tokens, by requests in flight.

No server and no text: clients hand token ids to one engine, and each sends its next request when the last has ended.
Their first requests have other lengths than later ones, so that ends and arrivals soon spread over the steps. Prompts
are random and no request ends early, so every run does the same work. Next: decode.py, single steps.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from random import Random
from typing import Any, NamedTuple

from saccade.api.settings import BATCH_TOKENS
from saccade.bench.record import Record, describe_run, find_device, print_table, require_counts
from saccade.bench.rig import Rig, build_rig, choose_arrangement, count_free
from saccade.engine.engine import Engine
from saccade.engine.graphs import MOST_CAPTURED, CapturedModel
from saccade.engine.pages import allocate_cache, count_page_bytes
from saccade.engine.params import SamplingParams
from saccade.engine.scheduler import Scheduler
from saccade.errors import RequestError
from saccade.kernels import PAGE

ROUNDS = 3  # answers that every client has had when the count ends
TRAFFIC_COLUMNS = (
    ("clients", "clients", "d"), ("selections", "selections", ""),
    ("prompt", "prompt", "d"), ("output", "output", "d"), ("layers", "layers", "d"),
    ("requests_per_s", "requests/s", ".2f"), ("tokens_per_s", "tokens/s", ".0f"), ("ttft_ms", "first token, ms", ".1f"),
    ("ttft_p99_ms", "99 of 100", ".1f"), ("gap_ms", "between tokens, ms", ".2f"), ("gap_p99_ms", "99 of 100", ".2f"),
    ("longest_gap_ms", "longest", ".1f"), ("graphs", "graphs", "d"),
)  # fmt: skip


class TrafficTask(NamedTuple):
    """What each client asks for, again and again."""

    prompt: int  # tokens
    output: int  # tokens
    chunk: int  # max_batch_tokens
    captures: bool = False  # whether what each token selects is kept


class Client:
    """Its request under way, and when its tokens came."""

    def __init__(self, engine: Engine, work: TrafficTask, dice: Random) -> None:
        self._engine, self._work, self._dice = engine, work, dice
        self.begin_counting()
        self._ask(dice.randint(1, work.output))

    def begin_counting(self) -> None:
        self.firsts: list[float] = []  # seconds from a request to its first token
        self.gaps: list[float] = []  # seconds between tokens
        self.ended = self.tokens = 0

    def _ask(self, output: int) -> None:
        prompt = [self._dice.randrange(self._engine.vocab_size) for _ in range(self._work.prompt)]
        params = SamplingParams(max_tokens=output, temperature=0.0, ignore_eos=True)
        self.job = self._engine.add(prompt, params, capture=self._work.captures)
        self._asked, self._last = time.perf_counter(), 0.0

    def take(self, tokens: int, now: float) -> None:
        """`tokens` more of its request. Behind the last of them it asks again."""
        if tokens and self._last:
            self.gaps += [(now - self._last) / tokens] * tokens
        elif tokens:
            self.firsts.append(now - self._asked)
        if tokens:
            self._last = now
            self.tokens += tokens
        if self.job.request not in self._engine.jobs:
            self.ended += 1
            self._ask(self._work.output)


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
) -> list[Record]:
    """One record for each number of clients. `chunk`: tokens of a step at most (max_batch_tokens). `capture`: a second
    record of each, in which all selections are captured."""
    at = find_device(device)
    work = TrafficTask(prompt, output, BATCH_TOKENS[at.type] if chunk is None else chunk)
    require_counts(prompt=prompt, output=output, chunk=work.chunk)
    rig = build_rig(shape, layers, at, seed)
    config = rig.shape.config
    if prompt + output > config.max_position_embeddings:
        raise RequestError(
            f"prompt and output: expected {config.max_position_embeddings} tokens at most, found {prompt + output}"
        )
    common: Record = {
        **describe_run(at, commit), "shape": shape, "layers": config.num_hidden_layers, "notes": list(rig.shape.notes),
        "prompt": prompt, "output": output, "chunk": work.chunk, "seed": seed,
    }  # fmt: skip
    records: list[Record] = []
    for count in clients:
        pages = count * -(-(prompt + output) // PAGE) + 1
        needed = pages * count_page_bytes(config, rig.plan.dtype, False)
        if at.type == "cuda" and needed > 0.9 * count_free(at):
            say(f"left out: {count} clients: their cache needs {needed / 1e9:.1f} GB")
            continue
        for captures in (False, True) if capture else (False,):
            records.append({**common, **measure_traffic(rig, count, work._replace(captures=captures), pages)})
            say(f"{count} clients: {records[-1]['tokens_per_s']:.0f} tokens/s")
    if not records:
        raise RequestError("nothing was measured: no number of clients fits the device; try fewer --layers")
    return records


def measure_traffic(rig: Rig, count: int, work: TrafficTask, pages: int) -> Record:
    """`count` clients. What comes before each has had an answer is not counted: kernels compile, and graphs of what
    recurs are captured."""
    model, device = rig.make_model(choose_arrangement(rig.device)), rig.device
    runner: Any = CapturedModel(model) if device.type == "cuda" else model
    cache = allocate_cache(rig.shape.config, pages, rig.plan.dtype, device, mtp=False)
    scheduler = Scheduler(pages, work.chunk, count, work.prompt + work.output)
    small = MOST_CAPTURED if device.type == "cuda" else 0
    engine = Engine(runner, cache, scheduler, rig.shape.config.vocab_size, device, small=small)
    callers = [Client(engine, work, Random(i)) for i in range(count)]
    owners = {caller.job.request: caller for caller in callers}

    def run_until(rounds: int) -> float:
        """Until every client has had so many answers; the time."""
        while min(caller.ended for caller in callers) < rounds:
            updates = engine.step()
            now = time.perf_counter()
            for update in updates:
                caller = owners.pop(update.job.request)
                caller.take(len(update.tokens), now)
                owners[caller.job.request] = caller
        return time.perf_counter()

    begun = run_until(1)
    for caller in callers:
        caller.begin_counting()
    seconds = run_until(ROUNDS) - begun
    ended, tokens = (sum(getattr(caller, name) for caller in callers) for name in ("ended", "tokens"))
    firsts, gaps = ([1e3 * t for caller in callers for t in getattr(caller, name)] for name in ("firsts", "gaps"))
    return {
        "clients": count, "selections": "captured" if work.captures else "-",
        "requests": ended, "seconds": seconds, "requests_per_s": ended / seconds,
        "tokens_per_s": tokens / seconds, "ttft_ms": statistics.median(firsts), "ttft_p99_ms": find_late(firsts),
        "gap_ms": statistics.median(gaps), "gap_p99_ms": find_late(gaps), "longest_gap_ms": max(gaps),
        "graphs": runner.count_recorded() if isinstance(runner, CapturedModel) else None,
    }  # fmt: skip


def find_late(times: Sequence[float]) -> float:
    """The time that 99 of 100 do not exceed."""
    return sorted(times)[-(-99 * len(times) // 100) - 1]


def show_engine(records: Sequence[Record]) -> str:
    """The table for people, with the conditions under it."""
    one = records[0]
    return "\n".join([
        print_table(records, TRAFFIC_COLUMNS),
        f"{one['shape']} ({'; '.join(one['notes']) or 'whole'}), synthetic weights",
        f"steps of {one['chunk']} tokens at most; {ROUNDS} answers of each client and more are counted",
        f"{one['device']}; torch {one['torch']}",
        *show_cost(records),
        one["command"],
    ])  # fmt: skip


def show_cost(records: Sequence[Record]) -> list[str]:
    """What captured selections cost, by the tokens a second of neighbours."""
    lines = []
    for plain, captured in zip(records, records[1:], strict=False):
        if (plain["selections"], captured["selections"]) == ("-", "captured"):
            cost = plain["tokens_per_s"] / captured["tokens_per_s"] - 1
            lines.append(f"captured selections cost {cost:.1%} of the time of {plain['clients']} clients")
    return lines
