"""Which tokens requests hold, counted on the device: a row for each request whose penalties ask.

A step of 64 requests with 4,096 tokens each copies 64 new tokens to the device, not 262,144. A row can be made anew
from the request's tokens at any time, so that nothing has to be kept of requests that wait. Next: change.py reads it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from saccade.engine.scheduling.requests import Request


class SeenTokens:
    """i32 [1 + requests, vocab]: twice the times that a token was generated, plus 1 if the prompt holds it.

    Row 0 is all zeros. Nothing is allocated before the first request asks: 34 MB for 64 requests and 129,280 tokens.
    """

    def __init__(self, requests: int, vocab_size: int, device: torch.device | str) -> None:
        """`requests`: that are in a step at most."""
        self._shape, self._device = (1 + requests, vocab_size), device
        self.table: Tensor | None = None  # stays where it is: CUDA graphs read it
        self._rows: dict[Request, tuple[int, int]] = {}  # row, and tokens counted there; the latest used is the last
        self._free = list(range(requests, 0, -1))

    def follow(self, requests: Sequence[Request]) -> list[int]:
        """The row of each, up to date. Not waited for."""
        if self.table is None:
            self.table = torch.zeros(self._shape, dtype=torch.int32, device=self._device)
        places, amounts, rows = list[int](), list[int](), list[int]()
        for request in requests:
            row, counted = self._rows.pop(request, (0, 0))
            if not row:
                row = self._take_row()
                self.table[row].zero_()
            self._rows[request] = row, len(request.tokens)
            rows.append(row)
            start = row * self._shape[1]
            if counted < request.prompt_length:
                told = sorted(set(request.tokens[: request.prompt_length]))
                places += [start + token for token in told]
                amounts += [1] * len(told)
            new = request.tokens[max(counted, request.prompt_length) :]
            places += [start + token for token in new]
            amounts += [2] * len(new)
        if places:
            pairs = torch.tensor([places, amounts])
            if torch.device(self._device).type == "cuda":
                pairs = pairs.pin_memory().to(self._device, non_blocking=True)
            self.table.view(-1).index_add_(0, pairs[0], pairs[1].int())
        return rows

    def forget(self, request: Request) -> None:
        """It has ended, or waits again."""
        row, _ = self._rows.pop(request, (0, 0))
        if row:
            self._free.append(row)

    def _take_row(self) -> int:
        if not self._free:  # of one that is not in this step: preempted, it will be counted anew
            self.forget(next(iter(self._rows)))
        return self._free.pop()
