"""Clients of an engine, and what they see of it: who asks when, when tokens come, how long they take.

Knows no shape and no device. Next: traffic.py, which measures an engine by them.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import Any, NamedTuple

from saccade.bench.record import Record
from saccade.engine.engine import Engine
from saccade.engine.params import SamplingParams

ROUNDS = 3  # answers that every client has had when the count ends


class TrafficTask(NamedTuple):
    """What each client asks for, again and again."""

    prompt: int  # tokens
    output: int  # tokens
    chunk: int  # max_batch_tokens
    captures: bool = False  # whether what each token selects is kept
    mixed_chunk: int | None = None  # max_mixed_tokens; None: as many as `chunk`
    temperature: float = 0.0  # 0: the likeliest token each time
    top_p: float = 1.0


class Client:
    """Its request under way, and when its tokens came."""

    def __init__(
        self,
        engine: Engine,
        work: TrafficTask,
        dice: Random,
        params: SamplingParams | None = None,
        is_single: bool = False,
    ) -> None:
        """`params`: of its requests; None: as `work` says, to the last token. `is_single`: it asks once."""
        self._engine, self._work, self._dice, self._is_single = engine, work, dice, is_single
        self._params = params or SamplingParams(temperature=work.temperature, top_p=work.top_p, ignore_eos=True)
        self.begin_counting()
        self._ask(work.output if is_single else dice.randint(1, work.output))

    def begin_counting(self) -> None:
        self.firsts: list[float] = []  # seconds from a request to its first token
        self.gaps: list[float] = []  # seconds between tokens
        self.ended = self.tokens = 0

    def _ask(self, output: int) -> None:
        prompt = [self._dice.randrange(self._engine.vocab_size) for _ in range(self._work.prompt)]
        params = replace(self._params, max_tokens=output)
        self.job = self._engine.add(prompt, params, capture=self._work.captures)
        self.asked, self._last = time.perf_counter(), 0.0

    def take(self, tokens: int, now: float) -> None:
        """`tokens` more of its request. Behind the last of them it asks again."""
        if tokens and self._last:
            self.gaps += [(now - self._last) / tokens] * tokens
        elif tokens:
            self.firsts.append(now - self.asked)
        if tokens:
            self._last = now
            self.tokens += tokens
        if self.job.request not in self._engine.jobs:
            self.ended += 1
            if not self._is_single:
                self._ask(self._work.output)


class Arrivals:
    """Requests that come by chance, whether or not the engine is ready for them; `most` are in it at a time."""

    def __init__(self, engine: Engine, work: TrafficTask, rate: float, most: int, dice: Random) -> None:
        """`rate`: requests a second, on average; times between them are exponential, as of many independent people."""
        self._engine, self._work, self._rate, self._most, self._dice = engine, work, rate, most, dice
        self._next = time.perf_counter()
        self._queue: list[float] = []  # when those came that wait for a place
        self.open: dict[Any, Client] = {}

    def enter(self, now: float) -> None:
        """Let in whoever has come. What they waited for a place counts as waited."""
        while self._next <= now:
            self._queue.append(self._next)
            self._next += self._dice.expovariate(self._rate)
        while self._queue and len(self.open) < self._most:
            client = Client(self._engine, self._work, self._dice, is_single=True)
            client.asked = self._queue.pop(0)
            self.open[client.job.request] = client

    def wait(self, now: float) -> None:
        """Until the next one comes, if nobody is there."""
        if not self.open:
            time.sleep(max(0.0, self._next - now))


def measure_traffic(engine: Engine, count: int, work: TrafficTask) -> Record:
    """`count` clients who ask again and again. What comes before each has had an answer is not counted: kernels
    compile, and graphs of what recurs are captured."""
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
    for caller in callers:
        engine.cancel(caller.job)
    return describe_times(callers, seconds)


def measure_arrivals(engine: Engine, most: int, work: TrafficTask, rate: float, seed: int) -> Record:
    """Requests that come by chance, until ROUNDS times `most` of them have ended, 20 at least."""
    arrivals, ended, begun = Arrivals(engine, work, rate, most, Random(seed)), list[Client](), time.perf_counter()
    while len(ended) < max(20, ROUNDS * most):
        now = time.perf_counter()
        arrivals.enter(now)
        arrivals.wait(now)
        updates = engine.step()
        now = time.perf_counter()
        for update in updates:
            client = arrivals.open[update.job.request]
            client.take(len(update.tokens), now)
            if client.ended:
                ended.append(arrivals.open.pop(update.job.request))
    seconds = time.perf_counter() - begun
    for client in arrivals.open.values():
        engine.cancel(client.job)
    return {"asked_per_s": rate, **describe_times(ended, seconds)}


def describe_times(clients: Sequence[Client], seconds: float) -> Record:
    """What the clients counted in so many seconds."""
    ended, tokens = (sum(getattr(client, name) for client in clients) for name in ("ended", "tokens"))
    firsts, gaps = ([1e3 * t for client in clients for t in getattr(client, name)] for name in ("firsts", "gaps"))
    gaps = gaps or [0.0]  # of answers of one token
    return {
        "requests": ended, "seconds": seconds, "requests_per_s": ended / seconds, "tokens_per_s": tokens / seconds,
        "ttft_ms": statistics.median(firsts), "ttft_p99_ms": find_late(firsts), "gap_ms": statistics.median(gaps),
        "gap_p95_ms": find_late(gaps, 95), "gap_p99_ms": find_late(gaps), "longest_gap_ms": max(gaps),
    }  # fmt: skip


def find_late(times: Sequence[float], percent: int = 99) -> float:
    """The time that so many of 100 do not exceed."""
    return sorted(times)[-(-percent * len(times) // 100) - 1]
