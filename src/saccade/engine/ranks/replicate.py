"""One engine on every rank: rank 0's decides, the others' do the same.

An engine is deterministic but for what enters it: requests, cancellations, and the number of drafts, which depends on
times. Rank 0 notes what enters and sends it with the next step, in one small message. So every rank schedules, samples
and detokenizes by itself, from equal bits, and knows all tokens without being told. Next: parallel/lead.py sends,
api/loading/rank.py receives.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import fields, replace
from typing import Any

from saccade.engine.engine import Engine
from saccade.engine.pace import Pace
from saccade.engine.params import SamplingParams
from saccade.engine.ranks.compare import Compared
from saccade.engine.request import Job
from saccade.engine.scheduling.requests import Chunk
from saccade.engine.steps.answers import Update
from saccade.engine.steps.selections import StepSelections
from saccade.parallel.lead import Lead
from saccade.parallel.ranks import Ranks


class LeadEngine(Engine):
    """Rank 0's. Once a rank is gone, everything raises RankError."""

    has_others = True
    compared: Compared | None = None  # with --check-ranks

    def __init__(self, lead: Lead, ranks: Ranks, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._check_sums = find_check(ranks)
        self._lead, self._events = lead, list[dict[str, Any]]()

    def add(self, tokens: Sequence[int], params: SamplingParams | None = None, capture: bool = False) -> Job:
        self._lead.check()
        job = super().add(tokens, params, capture)
        seeded = replace(job.params, seed=job.seed)
        self._events.append({"add": list(tokens), "params": write_params(seeded), "capture": capture})
        return job

    def add_scoring(self, tokens: Sequence[int]) -> Job:
        self._lead.check()
        job = super().add_scoring(tokens)
        self._events.append({"score": list(tokens)})
        return job

    def cancel(self, job: Job) -> None:
        super().cancel(job)
        self._events.append({"cancel": job.request.id})

    def fail(self, error: Exception) -> bool:
        """A step that fails on any rank ends all of them: no request is left."""
        had = bool(self.jobs)
        while self.jobs:  # those of the step first, then those that wait
            super().fail(error)
        return had

    def step(self) -> list[Update]:
        with self._lead.together("a step"), self._lead.tracker.working():
            updates = super().step()
            self._check_sums()
            if self.compared is not None and (found := self.compared.compare(list_tokens(updates))):
                self._lead.watch.fail(*found)
                self._lead.check()
            return updates

    def explain_failures(self) -> None:
        if not self.failures.are_open:
            return
        with self._lead.together("the search for a cause"), self._lead.tracker.working():
            super().explain_failures()

    def tell(self, head: Mapping[str, Any], payload: bytes | memoryview = b"") -> None:
        """And before it what has entered here."""
        events, self._events = self._events, []
        self._lead.tell({**head, "events": events}, payload)

    def allow_interrupts(self, around: Callable[[], AbstractContextManager[None]]) -> None:
        """Ctrl-C waits for the end of a step: the other ranks are in it too."""

    def _choose_drafts(self) -> int:
        drafts = super()._choose_drafts()
        self.tell({"do": "step", "drafts": drafts})
        return drafts


class ToldPace(Pace):
    """The pace of another rank: it takes as many drafts as rank 0 chose."""

    told = 0

    def choose(self, requests: int) -> int:
        return self.told


class FollowEngine(Engine):
    """Another rank's: it repeats rank 0's steps."""

    compared: Compared | None = None

    def __init__(self, ranks: Ranks, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._check_sums = find_check(ranks)
        self.pace: ToldPace = ToldPace()

    def repeat(self, drafts: int) -> None:
        """A step of rank 0."""
        self.pace.told = drafts
        updates = self.step()
        self._check_sums()
        if self.compared is not None:
            self.compared.compare(list_tokens(updates))  # rank 0 says what differs

    def enter(self, events: Sequence[Mapping[str, Any]]) -> None:
        """What entered at rank 0."""
        for event in events:
            self._enter(event)

    def _enter(self, event: Mapping[str, Any]) -> None:
        if "add" in event:
            self.add(event["add"], SamplingParams(**event["params"]), event["capture"])
        elif "score" in event:
            self.add_scoring(event["score"])
        else:
            for job in [job for job in self.jobs.values() if job.request.id == event["cancel"]]:
                self.cancel(job)

    def _send_selections(self, capture: StepSelections | None, chunks: list[Chunk]) -> None:
        """Steps are those of rank 0, which alone keeps what they select."""


def list_tokens(updates: Sequence[Update]) -> list[int]:
    return [token for update in updates for token in update.tokens]


def find_check(ranks: Ranks) -> Callable[[], None]:
    """What raises RankError behind a step on GPUs in which a sum waited for a rank in vain."""
    check: Callable[[], None] = getattr(ranks, "check", lambda: None)
    return check


def write_params(params: SamplingParams) -> dict[str, Any]:
    """As JSON, that `SamplingParams(**...)` reads; what a field says by default is left out."""
    return {f.name: value for f in fields(params) if (value := getattr(params, f.name)) != f.default}
