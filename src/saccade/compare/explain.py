"""Which known ways to compute explain what the other side says: one after the other, while each is surely nearer.

A difference of the size of rounding can be a format all the same: *which* tokens move, and where to, tells it. So an
explanation is judged by how much nearer it comes, token by token, and not by the size of what it leaves. Next: bars.py,
which has the measure; compare.py.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from torch import Tensor

from saccade.compare.bars import LEAST_RISE, Spread, Votes
from saccade.compare.report import Fit
from saccade.compare.scoring import Forced, ScoredText
from saccade.compare.variants.table import Variant, combine

TRIED = 5  # on all texts, after one text has ordered them
TOO_FAR = -0.5  # of a gain: three times as far away. Such a variant moves tokens by more than is left to explain
MOST_CAUSES = 3  # at the same time: FP8 index keys, FP8 latents and a fault


class Cause(NamedTuple):
    """One of the things that the other side does otherwise."""

    variant: Variant
    before: list[Forced]  # what is said of each text without it, and with it: all causes found earlier are in both
    said: list[Forced]
    fit: Fit  # of all causes up to this one, against those without it


class Screened(NamedTuple):
    """A variant on one text."""

    variant: Variant
    gain: Votes
    said: Forced

    @property
    def is_likely(self) -> bool:
        """Whether it may be nearer, for all that one text tells."""
        return self.gain.mean + 2 * self.gain.error > 0


class Explainer:
    """Texts that both sides have scored, ready to be explained."""

    def __init__(
        self,
        asked: Sequence[ScoredText],
        force: Callable[[Variant, Sequence[int]], Forced],
        rounded: Sequence[Sequence[Tensor]],
        tell: Callable[[str], None],
    ) -> None:
        """`rounded`: what runs that only round say of each text, at the tokens that are compared."""
        self._asked, self._force, self._tell = asked, force, tell
        self._noise = [
            [said - text.part(text.exact.logprobs) for text, said in zip(asked, run, strict=True)] for run in rounded
        ]

    def find(self, hypotheses: Iterable[Variant]) -> tuple[list[Fit], list[Cause]]:
        """How well explanations fit, best first; and the causes, each surely nearer than those before it."""
        left, causes, fits = list(hypotheses), list[Cause](), list[Fit]()
        said = [text.exact for text in self._asked]
        while left and len(causes) < MOST_CAUSES:
            screened = self._screen(left, [cause.variant for cause in causes], said)
            found = self._try([item for item in screened[:TRIED] if item.is_likely] or screened[:1], causes, said)
            fits = fits or [cause.fit for cause in found]
            best = next((cause for cause in found if self._is_sure(cause)), None)
            if best is None:
                break
            fits = [best.fit, *fits] if causes else fits
            causes.append(best)
            said = best.said
            left = [v for v, gain, _ in screened if v.part != best.variant.part and gain.mean > TOO_FAR]
        return fits, causes

    def _screen(
        self, hypotheses: Sequence[Variant], known: Sequence[Variant], before: Sequence[Forced]
    ) -> list[Screened]:
        """How near each comes beside what is known, on one text, best first."""
        text, was = self._find_worst(before)
        found = []
        for variant in hypotheses:
            whole = combine([*known, variant])
            self._tell(f"trying: {whole.name}")
            said = self._force(whole, text.tokens)
            found.append(Screened(variant, Votes.of([text.leave(was)], [text.leave(said)]), said))
        return sorted(found, key=lambda item: -item.gain.mean)

    def _find_worst(self, before: Sequence[Forced]) -> tuple[ScoredText, Forced]:
        """The text that differs most in all: a long one, or a wrong one."""
        pairs = zip(self._asked, before, strict=True)
        return max(pairs, key=lambda pair: float(pair[0].leave(pair[1]).abs().sum()))

    def _try(self, screened: Sequence[Screened], causes: Sequence[Cause], before: Sequence[Forced]) -> list[Cause]:
        """The same on all texts."""
        worst, found = self._find_worst(before)[0], []
        was = [text.leave(said) for text, said in zip(self._asked, before, strict=True)]
        for variant, _, said in screened:
            whole = combine([*(cause.variant for cause in causes), variant])
            every = [said if text is worst else self._force(whole, text.tokens) for text in self._asked]
            lefts = [text.leave(forced) for text, forced in zip(self._asked, every, strict=True)]
            steps = [a - b for a, b in zip(was, lefts, strict=True)]
            votes = Votes.of(was, lefts), Votes.along(was, steps, self._noise[0])
            fit = Fit(whole.kind, whole.name, whole.text, Spread.of(lefts), *votes)
            found.append(Cause(variant, list(before), every, fit))
        return sorted(found, key=lambda cause: -cause.fit.gain.mean)

    def _is_sure(self, cause: Cause) -> bool:
        """Whether it is nearer, and differences surely point there; more surely than those of runs that only round."""
        steps = [
            text.part(said.logprobs - before.logprobs)
            for text, before, said in zip(self._asked, cause.before, cause.said, strict=True)
        ]
        chance = max(Votes.along(run, steps, self._noise[0]).mean for run in self._noise)
        fit = cause.fit
        return fit.gain.mean > 0 and fit.direction.is_sure and fit.direction.is_above(chance)


def find_selection_bar(asked: Sequence[ScoredText], rounded: Sequence[Tensor], topk: int) -> float | None:
    """If differences begin where an indexer has a choice, as those of no rounding do: how large they are before. Else
    None, also where no text has tokens on both sides of `topk`.

    `rounded`: what a run that only rounds says at the tokens that are compared.
    """
    theirs, noises = list[tuple[Tensor, Tensor]](), list[tuple[Tensor, Tensor]]()
    for text, said in zip(asked, rounded, strict=True):
        border = max(0, topk + 1 - text.first)  # a token's place is how many tokens it can see
        for sides, differences in ((theirs, text.leave(text.exact)), (noises, said - text.part(text.exact.logprobs))):
            sides.append((differences[:border], differences[border:]))
    early, late = (Votes.of([d[i] for d in theirs], [n[i] for n in noises]) for i in (0, 1))
    rise = late.since(early)
    has_both = any(len(before) and len(behind) for before, behind in theirs)
    if not (has_both and rise.is_sure and rise.mean >= LEAST_RISE):
        return None
    return Spread.of([before for before, _ in theirs]).largest
