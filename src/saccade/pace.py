"""How drafts fare, and how many of them pay: counts of accepted drafts, times of steps, and what follows from both.

Plain numbers: knows neither tensors nor requests, and no clock. Next: engine.py counts and measures.
"""

from collections import deque
from dataclasses import dataclass, field
from numbers import Integral
from statistics import median

from saccade.errors import ConfigError
from saccade.params import is_integer, show, show_count

MOST = 5  # drafts of a step

WARM_UP = 2  # steps of a kind that are not timed: the first compiles kernels, the second is captured
SAMPLES = 3  # times without which a number of drafts is not judged
KEPT = 9  # the latest times, of which the median counts
TRIES = 12  # steps after which a number that could not be timed is left alone until it is its turn again
PERIOD = 64  # steps after which the number that was timed longest ago is timed again: 5 of them, 8 %
FADING = 0.99  # of counts with each new step: acceptance is that of about the last hundred
MARGIN = 1.03  # by which another number must be better: a change costs a step that runs some tokens again


@dataclass
class Tally:
    """How drafts fared. Place i of the lists is position i + 1 behind the last known token; a draft is accepted only
    if all before it are."""

    steps: int = 0  # of a request, beyond the one that ended its prompt
    tokens: int = 0  # that those chose
    drafted: list[int] = field(default_factory=lambda: [0] * MOST)
    accepted: list[int] = field(default_factory=lambda: [0] * MOST)

    def add(self, judged: int, accepted: int, tokens: int) -> None:
        """A step whose first `judged` drafts met the model's own choice; `accepted` of them were the same."""
        self.steps += 1
        self.tokens += tokens
        for i in range(judged):
            self.drafted[i] += 1
            self.accepted[i] += i < accepted

    @property
    def tokens_per_step(self) -> float:
        return self.tokens / max(self.steps, 1)

    @property
    def shares(self) -> list[float]:
        """Of the steps with a draft at a position, how many accepted it."""
        return [a / n for a, n in zip(self.accepted, self.drafted, strict=True) if n]

    def __str__(self) -> str:
        text = f"{self.tokens_per_step:.2f} tokens a step"
        if not self.shares:
            return f"{text}, no drafts"
        each = ", ".join(f"{share:.0%}" for share in self.shares)
        where = f"positions 1 to {len(self.shares)}" if len(self.shares) > 1 else "position 1"
        if len(set(self.drafted) - {0}) > 1:
            where += ", each of the steps that guessed so far"
        return f"{text}; drafts accepted {each} at {where} ({sum(self.accepted)} of {sum(self.drafted)})"


def expect_tokens(shares: list[float], drafts: int) -> float:
    """Tokens of a step with so many drafts: one, and each draft with the probability that it is accepted."""
    return 1 + sum(shares[:drafts])


class Pace:
    """Chooses the number of drafts with the most tokens a second, from times measured here at the batch size at hand.

    Every number is tried a few steps first, and one again every PERIOD steps, the longest untimed. Drafts that do not
    pay are not made. Batch sizes are told apart by powers of two.
    """

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._seen: dict[tuple[int, int], int] = {}  # steps of (batch, drafts) that were timed, warm-up included
        self._times: dict[tuple[int, int], deque[float]] = {}  # seconds, the latest last
        self._tries: dict[tuple[int, int], int] = {}  # steps in which a number was tried
        self._timed_at: dict[tuple[int, int], int] = {}  # by the steps of that batch size
        self._steps: dict[int, int] = {}
        self._drafted, self._accepted = [0.0] * most, [0.0] * most
        self.chosen: dict[int, int] = {}  # by requests, up to that many: drafts that pay

    @property
    def shares(self) -> list[float]:
        """Accepted drafts by position, lately."""
        return [a / n if n else 0.0 for a, n in zip(self._accepted, self._drafted, strict=True)]

    def choose(self, requests: int) -> int:
        """Drafts for the next step of so many requests."""
        size = round_up(requests)
        self._steps[size] = steps = self._steps.get(size, 0) + 1
        if steps % PERIOD == 0:
            stale = min(range(self._most + 1), key=lambda k: self._timed_at.get((size, k), 0))
            self._timed_at[size, stale] = steps
            self._times.pop((size, stale), None)
            self._tries.pop((size, stale), None)
        for drafts in (*range(1, self._most + 1), 0):
            key = size, drafts
            if len(self._times.get(key, ())) < SAMPLES and self._tries.get(key, 0) < TRIES:
                self._tries[key] = self._tries.get(key, 0) + 1
                return drafts
        self.chosen[size] = self._find_best(size)
        return self.chosen[size]

    def _find_best(self, size: int) -> int:
        rates = {
            drafts: expect_tokens(self.shares, drafts) / median(self._times[size, drafts])
            for drafts in range(self._most + 1)
            if len(self._times.get((size, drafts), ())) >= SAMPLES
        }
        if not rates:
            return self.chosen.get(size, 0)
        best, now = max(rates, key=lambda k: rates[k]), self.chosen.get(size)
        return now if now in rates and rates[best] < MARGIN * rates[now] else best

    def note_time(self, requests: int, drafts: int, seconds: float) -> None:
        """A step of so many requests, each of which verified and made `drafts`, took so long, read included."""
        key = round_up(requests), drafts
        self._seen[key] = seen = self._seen.get(key, 0) + 1
        if seen > WARM_UP:
            self._times.setdefault(key, deque(maxlen=KEPT)).append(seconds)
            self._timed_at[key] = self._steps.get(key[0], 0)

    def note_drafts(self, judged: int, accepted: int) -> None:
        """As Tally.add."""
        for i in range(judged):
            self._drafted[i] = FADING * self._drafted[i] + 1
            self._accepted[i] = FADING * self._accepted[i] + (i < accepted)

    def __str__(self) -> str:
        """What was chosen, and why: one line for each batch size that was judged."""
        lines = []
        for size, drafts in sorted(self.chosen.items()):
            times = {k: median(t) for (batch, k), t in self._times.items() if batch == size and t}
            rates = {k: expect_tokens(self.shares, k) / times[k] for k in times}
            told = sorted({0, drafts, max((k for k in rates if k), key=lambda k: rates[k], default=0)} & set(times))
            why = ", ".join(
                f"{expect_tokens(self.shares, k):.2f} tokens in {1e3 * times[k]:.1f} ms with {k}" for k in told
            )
            who = "1 request" if size == 1 else f"up to {size} requests"
            lines.append(f"{show_count(drafts, 'draft')} a step for {who} ({why})")
        return "\n".join(lines) or "not chosen yet: each number of drafts is tried first"


@dataclass(frozen=True)
class Stats:
    """What became of speculation, over all requests so far."""

    speculate: int | str  # as set
    chosen: dict[int, int]  # "auto": drafts that pay for up to so many requests
    why: str  # "auto": one line for each batch size that was judged
    tally: Tally

    def __str__(self) -> str:
        chosen = "\n".join(f"  {line}" for line in self.why.splitlines()) if self.speculate == "auto" else ""
        return f"speculate {self.speculate}: {self.tally}" + (f"\n{chosen}" if chosen else "")


def round_up(requests: int) -> int:
    return 1 << max(0, requests - 1).bit_length()


def check_speculate(speculate: object) -> int | str:
    """A number of drafts, or "auto"; ConfigError for anything else."""
    if speculate == "auto":
        return "auto"
    if isinstance(speculate, str) and speculate in map(str, range(MOST + 1)):  # as a command line has it
        return int(speculate)
    if isinstance(speculate, Integral) and is_integer(speculate) and 0 <= int(speculate) <= MOST:
        return int(speculate)
    raise ConfigError(f'speculate: expected 0 to {MOST} drafts a step, or "auto", found {show(speculate)}')
