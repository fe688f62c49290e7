"""How much rounding moves log-probabilities, and when a difference is more than that.

Measured anew on the very tokens that are compared: rounding flips near ties of a selection, so that one token in a
hundred moves far more than the others, and how many do depends on the text. Next: judge.py.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

ROUNDING_MARGIN = 2.5  # times what was measured: another engine rounds in other places and so flips other ties
LEAST_MEAN, LEAST_TOKEN = 1e-3, 2e-2  # of short texts, on which rounding flips nothing by chance
FIT_MARGIN = 1.5  # times the mean of BF16 rounding, for a variant that explains a server
FIT_SHARE = 0.5  # of what it explains, at most this is left
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

    def fits(self, left: Spread, explained: Spread) -> bool:
        """Whether what a variant leaves is rounding, and so much less than before that no chance explains it."""
        return self.is_plain(left) and left.mean <= FIT_SHARE * explained.mean

    def is_plain(self, found: Spread) -> bool:
        """Whether the mean is so near to that of rounding alone that no explanation is looked for."""
        return found.mean <= max(FIT_MARGIN * self.measured.mean, LEAST_MEAN)
