"""How much rounding moves log-probabilities, when a difference is more than that, and when an explanation is nearer.

Measured anew on the very tokens that are compared: rounding flips near ties of a selection, so that one token in a
hundred moves far more than the others, and how many do depends on the text. Next: judge.py.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

ROUNDING_MARGIN = 2.5  # times what was measured: another engine rounds in other places and so flips other ties
LEAST_MEAN, LEAST_TOKEN = 1e-3, 2e-2  # of short texts, on which rounding flips nothing by chance
FIT_SHARE = 0.5  # of what is more than rounding, an explanation leaves at most this
SURE = 4.0  # standard errors
LEAST_SHARE = 0.03  # of votes, from which on they count at all
# Where every token is selected a wrong indexer moves nothing. From there to later tokens, against a run that rounds to
# FP8, faults of indexers rise by 0.44 to 1.1, engines that round to FP8 by at most 0.19 (docs/log.md).
LEAST_RISE = 0.3
NUMERICS = 1e-5  # nats: sums in another order move log-probabilities by a tenth of it
NEIGHBOURS = 16  # neighbours whose differences have one cause: an error of the mean counts them once
# The same of the bundled model on 390 tokens, for families whose variants are not known here.
USUAL_BF16, USUAL_FP8 = (1.4e-3, 0.13), (4.0e-3, 0.33)


class Spread(NamedTuple):
    """Absolute differences of log-probabilities."""

    mean: float
    largest: float

    @classmethod
    def of(cls, differences: Sequence[Tensor]) -> "Spread":
        """Of several texts together."""
        every = torch.cat([d.abs() for d in differences])
        return cls(float(every.mean()), float(every.max())) if len(every) else cls(0.0, 0.0)


class RoundingBar(NamedTuple):
    """Up to which difference rounding explains it."""

    name: str
    measured: Spread  # of rounding alone

    @property
    def mean(self) -> float:
        return max(ROUNDING_MARGIN * self.measured.mean, LEAST_MEAN)

    @property
    def token(self) -> float:
        return max(ROUNDING_MARGIN * self.measured.largest, LEAST_TOKEN)

    def holds(self, found: Spread) -> bool:
        return found.mean <= self.mean and found.largest <= self.token


class Votes(NamedTuple):
    """What tokens say of two hypotheses, each by (a - b) / (a + b), where a and b are how far it is from them.

    A vote is 1 where the second hypothesis leaves nothing, -1 where the first does. So the few tokens that rounding
    moves far count as much as each of the others.
    """

    mean: float
    error: float  # standard error of it

    @classmethod
    def of(cls, before: Sequence[Tensor], after: Sequence[Tensor]) -> "Votes":
        """By what two hypotheses leave of several texts: whether the second is nearer."""
        return cls.weigh(before, after, [torch.ones_like(left) for left in after])

    @classmethod
    def along(cls, before: Sequence[Tensor], steps: Sequence[Tensor], noise: Sequence[Tensor]) -> "Votes":
        """Whether differences point where an explanation's steps do: 0 for rounding, however small the steps.

        By half a step forth and half a step back. A token counts by how much of it is step, where a run that only
        rounds moves it by `noise`.
        """
        pairs = list(zip(before, steps, strict=True))
        weights = [step.abs() / (step.abs() + moved.abs() + NUMERICS) for step, moved in zip(steps, noise, strict=True)]
        return cls.weigh([was + step / 2 for was, step in pairs], [was - step / 2 for was, step in pairs], weights)

    @classmethod
    def weigh(cls, first: Sequence[Tensor], second: Sequence[Tensor], weights: Sequence[Tensor]) -> "Votes":
        """The weighted mean of the votes."""
        votes = [(a.abs() - b.abs()) / (a.abs() + b.abs() + NUMERICS) for a, b in zip(first, second, strict=True)]
        total = float(sum(weight.sum() for weight in weights))
        if sum(map(len, votes)) < NEIGHBOURS or total < 1.0:  # tells nothing
            return cls(0.0, 1.0)
        mean = float(sum((vote * weight).sum() for vote, weight in zip(votes, weights, strict=True))) / total
        off = [(vote - mean) * weight for vote, weight in zip(votes, weights, strict=True)]
        by_run = torch.stack([run.sum() for text in off for run in text.split(NEIGHBOURS)])
        squares = max(float(sums.square().sum()) for sums in (by_run, torch.cat(off)))  # one run has no spread
        return cls(mean, math.sqrt(squares) / total)

    @property
    def is_sure(self) -> bool:
        return self.is_above(0.0) and self.mean >= LEAST_SHARE

    def is_above(self, chance: float) -> bool:
        return self.mean - SURE * self.error > chance

    def since(self, other: "Votes") -> "Votes":
        """The difference to that of other tokens."""
        return Votes(self.mean - other.mean, math.hypot(self.error, other.error))
