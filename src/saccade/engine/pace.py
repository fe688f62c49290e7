"""How drafts fare, and how many of them pay: counts of accepted drafts, times of steps, and what follows from both.

Plain numbers: knows neither tensors nor requests, and no clock. Next: engine.py counts and measures.
"""

from collections import deque
from dataclasses import dataclass, field
from numbers import Integral

from saccade.base.values import is_integer, show, show_count
from saccade.engine.scheduling.prefix_cache import PrefixTally
from saccade.errors import ConfigError

DRAFT_LIMIT = 5  # drafts of a step

WARM_UP = 2  # steps of a kind that are not timed: the first compiles kernels, the second is captured
LEAST_TIMES = 3  # times without which a number of drafts is not judged
KEPT_TIMES = (
    9  # the latest times, of which the shortest counts: other work, compiling and capturing only make a step longer
)
MOST_TRIES = 12  # steps after which a number that could not be timed is left alone until it is its turn again
PERIOD = 64  # steps from a choice to the first look at another number: 3 to 5 of them
LONGEST_PERIOD = 512  # the period doubles up to here while each look confirms the choice: then looking costs 1 %
FADING = 0.99  # of counts with each new step: acceptance is that of about the last hundred
AGED = 0.3  # what is left of counts after a time without drafts
MARGIN = 1.03  # by which another number must be better: a change costs a step that runs some tokens again
HOPED = 0.8  # of first drafts, before any was made: DeepSeek-V3's report has 85 to 90 %
DOUBT = 3  # drafts that such an expectation counts for: five steps alone say little
GUESSED = 0.95  # of an interpolated time: that of a number which was not timed, and is worth a try if it would pay so


@dataclass
class Tally:
    """How drafts fared. Place i of the lists is position i + 1 behind the last known token; a draft is accepted only
    if all before it are."""

    steps: int = 0  # of a request, beyond the one that ended its prompt
    tokens: int = 0  # that those chose
    drafted: list[int] = field(default_factory=lambda: [0] * DRAFT_LIMIT)
    accepted: list[int] = field(default_factory=lambda: [0] * DRAFT_LIMIT)

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

    A number is tried for a few steps if it could be the best: by the acceptance so far, and by a time that lies
    between those of its neighbours. One draft and none come first. Later one of the others is tried again now and then,
    ever more rarely while it changes nothing. Batch sizes are told apart by powers of two.
    """

    def __init__(self, most: int = DRAFT_LIMIT) -> None:
        self._most = most
        self._seen: dict[tuple[int, int], int] = {}  # steps of (batch, drafts) that were timed, warm-up included
        self._times: dict[tuple[int, int], deque[float]] = {}  # seconds, the latest last
        self._tries: dict[tuple[int, int], int] = {}  # steps in which a number was tried
        self._trials: dict[int, int] = {}  # the number that is being tried
        self._steps: dict[int, int] = {}  # since the choice, or since the last look at another number
        self._periods: dict[int, int] = {}
        self._drafted, self._accepted = [0.0] * most, [0.0] * most
        self.chosen: dict[int, int] = {}  # by requests, up to that many: drafts that pay

    @property
    def shares(self) -> list[float]:
        """Accepted drafts by position, lately. Where few were made, nearer to what is usual: HOPED of the first, and of
        each other as if it was as likely as the first."""
        shares = list[float]()
        for accepted, drafted in zip(self._accepted, self._drafted, strict=True):
            usual = shares[-1] * shares[0] if shares else HOPED
            shares.append((accepted + DOUBT * usual) / (drafted + DOUBT))
        return shares

    def choose(self, requests: int) -> int:
        """Drafts for the next step of so many requests."""
        size = round_up(requests)
        self._steps[size] = self._steps.get(size, 0) + 1
        trial = self._trials.get(size)
        if (
            trial is None
            or len(self._times.get((size, trial), ())) >= LEAST_TIMES
            or self._tries[size, trial] >= MOST_TRIES
        ):
            trial = self._find_trial(size)
        if trial is None:
            self._trials.pop(size, None)
            return self.chosen[size]
        self._trials[size] = trial
        self._tries[size, trial] = self._tries.get((size, trial), 0) + 1
        return trial

    def _find_trial(self, size: int) -> int | None:
        """The number to be tried next; None if `chosen`, which is renewed here, is to be used."""
        for drafts in (1, 0):
            if (size, drafts) not in self._tries:
                return drafts
        guesses = {k: expect_tokens(self.shares, k) / self._guess_time(size, k) for k in range(self._most + 1)}
        best, before = self._find_best(size), self.chosen.get(size)
        untried = [k for k in guesses if (size, k) not in self._tries and guesses[k] > MARGIN * guesses[best]]
        if untried:
            return max(untried, key=lambda k: guesses[k])
        self.chosen[size] = best
        if best != before:
            self._steps[size], self._periods[size] = 0, PERIOD
        if self._steps[size] < self._periods[size]:
            return None
        self._steps[size], self._periods[size] = 0, min(LONGEST_PERIOD, 2 * self._periods[size])
        others = [k for k in guesses if k != best]  # what was never tried comes first
        other = 1 if best == 0 else max(others, key=lambda k: ((size, k) not in self._tries, guesses[k]))
        self._times.pop((size, other), None)
        self._tries.pop((size, other), None)
        if best == 0:  # nothing was seen of drafts since: the old counts are no more than a hint, and only of the first
            self._drafted = [AGED * self._drafted[0], *[0.0] * (self._most - 1)]
            self._accepted = [AGED * self._accepted[0], *[0.0] * (self._most - 1)]
        return other

    def _find_best(self, size: int) -> int:
        rates = {
            drafts: expect_tokens(self.shares, drafts) / min(self._times[size, drafts])
            for drafts in range(self._most + 1)
            if len(self._times.get((size, drafts), ())) >= LEAST_TIMES
        }
        if not rates:
            return self.chosen.get(size, 0)
        best, now = max(rates, key=lambda k: rates[k]), self.chosen.get(size)
        return now if now in rates and rates[best] < MARGIN * rates[now] else best

    def _guess_time(self, size: int, drafts: int) -> float:
        """Seconds of a step: as timed, or by those of fewer and of more drafts. Beyond the most that were timed each
        draft is taken to cost half of what those before it did: on an H200 1.1 ms instead of 2.2 of the first."""
        timed = [(k, min(self._times[size, k])) for k in range(self._most + 1) if self._times.get((size, k))]
        less = [each for each in timed if each[0] <= drafts]
        more = [each for each in timed if each[0] > drafts]
        if not less:
            return more[0][1] if more else 1.0
        k, seconds = less[-1]
        if k == drafts:
            return seconds
        if more:
            return GUESSED * (seconds + (more[0][1] - seconds) * (drafts - k) / (more[0][0] - k))
        first, start = less[0]
        return seconds + (drafts - k) * 0.5 * max(0.0, seconds - start) / max(1, k - first)

    def note_time(self, requests: int, drafts: int, seconds: float) -> None:
        """A step of so many requests, each of which verified and made `drafts`, took so long, read included."""
        key = round_up(requests), drafts
        self._seen[key] = seen = self._seen.get(key, 0) + 1
        if seen > WARM_UP:
            self._times.setdefault(key, deque(maxlen=KEPT_TIMES)).append(seconds)

    def note_drafts(self, judged: int, accepted: int) -> None:
        """As Tally.add."""
        for i in range(judged):
            self._drafted[i] = FADING * self._drafted[i] + 1
            self._accepted[i] = FADING * self._accepted[i] + (i < accepted)

    def __str__(self) -> str:
        """What was chosen, and why: one line for each batch size that was judged."""
        lines = []
        for size, drafts in sorted(self.chosen.items()):
            times = {k: min(t) for (batch, k), t in self._times.items() if batch == size and t}
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
    """What became of speculation and of the prefix cache, over all requests so far."""

    speculate: int | str  # as set
    chosen: dict[int, int]  # "auto": drafts that pay for up to so many requests
    why: str  # "auto": one line for each batch size that was judged
    tally: Tally
    kernels: str = ""  # that run the steps with drafts: "fast" or "reference", as LLM's `kernels`; "" without drafts
    prefix: PrefixTally | None = None  # None without a prefix cache

    def __str__(self) -> str:
        prefix = f"\n{self.prefix}" if self.prefix is not None and self.prefix.found else ""
        chosen = "\n".join(f"  {line}" for line in self.why.splitlines()) if self.speculate == "auto" else ""
        kernels = f"; kernels: {self.kernels}" if self.kernels else ""
        return f"speculate {self.speculate}: {self.tally}{kernels}" + (f"\n{chosen}" if chosen else "") + prefix


def round_up(requests: int) -> int:
    return 1 << max(0, requests - 1).bit_length()


def check_speculate(speculate: object) -> int | str:
    """A number of drafts, or "auto"; ConfigError for anything else."""
    if speculate == "auto":
        return "auto"
    if isinstance(speculate, str) and speculate in map(str, range(DRAFT_LIMIT + 1)):  # as a command line has it
        return int(speculate)
    if isinstance(speculate, Integral) and is_integer(speculate) and 0 <= int(speculate) <= DRAFT_LIMIT:
        return int(speculate)
    raise ConfigError(f'speculate: expected 0 to {DRAFT_LIMIT} drafts a step, or "auto", found {show(speculate)}')
