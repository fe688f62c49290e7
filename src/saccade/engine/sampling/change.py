"""What changes rows of logits before a token is chosen: penalties, biases, the mask of a grammar.

The host says it for each row (`Change`), as one flat tensor whose layout a `ChangeKind` tells; the device applies it
without a wait and without a shape that depends on data, so that a CUDA graph can hold it. A step in which nobody asks
has no kind, and nothing of this runs. Knows rows, not requests. Next: want.py says what each row is changed by,
engine/sample.py chooses from the result.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

MASK_BITS = 32  # of a word of a mask
_NONE = (1.0, 0.0, 0.0)


class Change(NamedTuple):
    """What one row of logits is changed by, on the host."""

    seen: int = 0  # its request's row of seen.py's table; 0: of a request without penalties
    penalties: tuple[float, float, float] = _NONE  # repetition, presence, frequency
    ahead: Sequence[int] = ()  # guesses that the row stands behind, which the table does not know yet
    biases: Sequence[tuple[int, float]] = ()  # token, and what is added to its logit
    banned: Sequence[int] = ()  # tokens
    mask: Any = None  # i32 [words] of numpy: a bit for each token that may be chosen; None: all may


class ChangeKind(NamedTuple):
    """What of a step's changes decides which operations it has, and their shapes."""

    ahead: int  # guesses before a row, at most; -1: no penalties
    biases: int  # of a row, at most; tokens that are banned are such
    words: int  # of a mask; 0: there are none


def find_change_kind(changes: Sequence[Change]) -> ChangeKind | None:
    """None if nothing is changed."""
    fined = [len(change.ahead) for change in changes if change.seen]
    biases = max((len(change.biases) + len(change.banned) for change in changes), default=0)
    words = max((len(change.mask) for change in changes if change.mask is not None), default=0)
    if not (fined or biases or words):
        return None
    return ChangeKind(max(fined, default=-1), 1 << (biases - 1).bit_length() if biases else 0, words)


def count_numbers(kind: ChangeKind | None, length: int) -> int:
    """Of the flat tensor, in f64, for `length` rows."""
    if kind is None:
        return 0
    return length * sum(_count_columns(kind))


def _count_columns(kind: ChangeKind) -> tuple[int, int, int]:
    """Numbers of a row: of its penalties, biases, mask."""
    return (4 + kind.ahead if kind.ahead >= 0 else 0), 2 * kind.biases, -(-kind.words // 2)


def fill_changes(changes: Sequence[Change], kind: ChangeKind, flat: Tensor) -> None:
    """Write the rows' changes into f64 [count_numbers]; rows of padding are left as they are, unchanged."""
    columns = _count_columns(kind)
    length = len(flat) // sum(columns)
    penalties, biases, masks = (
        part.numpy().reshape(length, width)
        for part, width in zip(flat.split([length * n for n in columns]), columns, strict=True)
    )
    if kind.ahead >= 0:
        penalties[:, 0], penalties[:, 1:4], penalties[:, 4:] = 0, _NONE, -1
    biases.fill(0)
    words = masks.view(np.int32) if kind.words else None
    if words is not None:
        words.fill(-1)
    for i, change in enumerate(changes):
        if change.seen:
            penalties[i, 0], penalties[i, 1:4] = change.seen, change.penalties
            penalties[i, 4 : 4 + len(change.ahead)] = change.ahead
        if change.biases or change.banned:
            pairs = [*change.biases, *((token, -math.inf) for token in change.banned)]
            biases[i, : 2 * len(pairs)] = np.asarray(pairs, dtype=np.float64).reshape(-1)
        if change.mask is not None and words is not None:
            words[i, : len(change.mask)] = change.mask


@dataclass(frozen=True)
class Changes:
    """Those of L rows, on the device."""

    kind: ChangeKind
    seen: Tensor | None  # i32 [rows, vocab]: seen.py's table, where anybody has penalties
    penalties: Tensor  # f64 [L, 4 + ahead]   row of the table, penalties, guesses before
    biases: Tensor  # f64 [L, biases, 2]   pairs of token and bias
    masks: Tensor  # i32 [L, words]

    @classmethod
    def take(cls, flat: Tensor, kind: ChangeKind, seen: Tensor | None) -> "Changes":
        """Out of f64 [count_numbers], as `fill_changes` writes it."""
        columns = _count_columns(kind)
        length = len(flat) // sum(columns)
        penalties, biases, masks = flat.split([length * n for n in columns])
        words = masks.view(torch.int32).view(length, 2 * columns[2])[:, : kind.words]
        return cls(kind, seen, penalties.view(length, columns[0]), biases.view(length, kind.biases, 2), words)

    def part(self, first: int, end: int) -> "Changes":
        """Of some rows."""
        cut = slice(first, end)
        return Changes(self.kind, self.seen, self.penalties[cut], self.biases[cut], self.masks[cut])

    def apply(self, logits: Tensor) -> Tensor:
        """The logits [L, V] as tokens are chosen from: repetition, presence and frequency, then biases, then masks.
        What is banned is minus infinity. A row that nothing changes keeps its bits."""
        if self.kind.ahead >= 0:
            logits = self._penalize(logits)
        if self.kind.biases:
            tokens, added = self.biases[:, :, 0].long(), self.biases[:, :, 1].float()
            # Padding adds 0 to token 0: in whatever order that comes, the sum is the same.
            logits = logits.scatter_add(1, tokens, added)
        if self.kind.words:
            bit = torch.arange(MASK_BITS, device=logits.device, dtype=torch.int32)
            allowed = ((self.masks[:, :, None] >> bit) & 1).view(len(logits), -1)[:, : logits.shape[1]]
            logits = torch.where(allowed.bool(), logits, -math.inf)
        return logits

    def _penalize(self, logits: Tensor) -> Tensor:
        assert self.seen is not None
        times = self.seen[self.penalties[:, 0].long()]
        if self.kind.ahead:
            ahead = self.penalties[:, 4:].long()
            times = times.scatter_add(1, ahead.clamp(min=0), 2 * (ahead >= 0).int())
        repetition, presence, frequency = self.penalties[:, 1:4].float().T[:, :, None]
        repeated = torch.where(logits > 0, logits / repetition, logits * repetition)
        logits = torch.where(times > 0, repeated, logits)
        count = times >> 1
        return logits - (frequency * count + presence * (count > 0))
