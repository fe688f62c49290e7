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
# Measured on 728 tokens of the bundled model (docs/log.md): the right format gains 0.16 to 0.54, 6 to 20 standard
# errors; what rounding has in common with a wrong one, at most 0.01, 1.2 of them.
SURE = 4.0  # standard errors
LEAST_GAIN = 0.03
# Where every token is selected a wrong indexer moves nothing. From there to later tokens, against a run that rounds to
# FP8, faults of indexers rise by 0.44 to 1.1, engines that round to FP8 by at most 0.19 (same log).
LEAST_RISE = 0.3
NUMERICS = 1e-5  # nats: sums in another order move log-probabilities by a tenth of it
RUN = 16  # neighbours whose differences have one cause: an error of the mean counts them once
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


class Gain(NamedTuple):
    """How much nearer one hypothesis is than another to what somebody says.

    Of each token (before - after) / (before + after), both absolute differences: 1 where nothing is left, -1 where
    nothing was. So the few tokens that rounding moves far count as much as each of the others.
    """

    mean: float
    error: float  # standard error of it

    @classmethod
    def of(cls, before: Sequence[Tensor], after: Sequence[Tensor]) -> "Gain":
        """Of differences that two hypotheses leave of several texts."""
        gains = [
            (was.abs() - left.abs()) / (was.abs() + left.abs() + NUMERICS)
            for was, left in zip(before, after, strict=True)
        ]
        every = torch.cat(gains) if gains else torch.zeros(0)
        if len(every) < RUN:  # tells nothing
            return cls(float(every.mean()) if len(every) else 0.0, 1.0)
        runs = torch.stack([run.sum() for text in gains for run in text.split(RUN)])
        squares = max(float((sums - sums.mean()).square().sum()) for sums in (runs, every))  # one run has no spread
        return cls(float(every.mean()), math.sqrt(squares) / len(every))

    @property
    def is_sure(self) -> bool:
        return self.is_above(0.0) and self.mean >= LEAST_GAIN

    def is_above(self, chance: float) -> bool:
        return self.mean - SURE * self.error > chance

    def since(self, other: "Gain") -> "Gain":
        """The difference to that of other tokens."""
        return Gain(self.mean - other.mean, math.hypot(self.error, other.error))
