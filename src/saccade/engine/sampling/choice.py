"""What was chosen for one row of logits, on the host, and whether it is an answer to whoever asked.

Knows no tensor and no request. Next: sample.py chooses; steps/answers.py takes what was chosen.
"""

import math
from typing import NamedTuple

NOT_FINITE = -1  # the token of a row that has none: NaN or infinity is among its logits or log-probabilities
NOTHING_LEFT = -2  # the token of a row that has none: its request's grammar and options ban all of them


class Choice(NamedTuple):
    """One row's result, on the host. A step tells of all rows what one of them was asked for, or more: see `cut`."""

    token: int  # NOT_FINITE or NOTHING_LEFT: none can be chosen, and nothing else here counts
    logprob: float  # 0.0 if not asked for
    top: tuple[tuple[int, float], ...]  # the likeliest (token, log-probability), best first

    def cut(self, asked: int | None) -> "Choice":
        """The row as if it alone had been asked: with `asked` likeliest tokens, None for no log-probability at all. Its
        token is NOT_FINITE if one that was asked for is not finite: of finite logits with 3e38 between two of them, a
        log-probability is minus infinity."""
        if asked is None:
            return Choice(self.token, 0.0, ())
        top = self.top[:asked]
        is_finite = math.isfinite(self.logprob) and all(math.isfinite(logprob) for _, logprob in top)
        return Choice(self.token if is_finite or self.token < 0 else NOT_FINITE, self.logprob, top)
