"""A debug switch: after each step, what every rank has computed is compared, and the first layer that differs is named.

All ranks must have the same bits of hidden states, selections, logits and tokens. A wrapper around the operations takes
a checksum of each, in the order of the step; the model knows nothing of it. It reads the device once a step, and steps
are not captured: this is slow. Next: replicate.py, which asks after each step.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saccade.engine.causes import list_tensors
from saccade.ops.interface import Residual
from saccade.ops.step import Batch
from saccade.parallel.ranks import Ranks

ON_ALL_RANKS = (
    "select",
    "select_all",
    "logits",
    "project_head",
    "normalize",
)  # tensors that every rank has, beside residuals
PRIME = 1_000_003


class RankDifference(NamedTuple):
    rank: int
    text: str


class Compared:
    """Operations whose results are noted. `held`: the names of parameters, by which a layer is named."""

    def __init__(self, ops: Any, held: Mapping[str, Tensor], ranks: Ranks) -> None:
        self._ops, self._ranks = ops, ranks
        self._names = {id(tensor): name for name, tensor in held.items()}
        self._labels, self._sums = list[str](), list[Tensor]()
        self._module = ""  # of the last operation that was given a parameter

    def for_batch(self, batch: Batch) -> "Compared":
        """See Ops. What those note is noted here."""
        other = Compared(self._ops.for_batch(batch), {}, self._ranks)
        other._names, other._labels, other._sums = self._names, self._labels, self._sums
        return other

    def __getattr__(self, name: str) -> Any:
        operation = getattr(self._ops, name)
        return self._watch(name, operation) if callable(operation) else operation

    def _watch(self, name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any) -> Any:
            result = operation(*args)
            self._module = self._find_module(args) or self._module
            for part in result if isinstance(result, tuple) else (result,):
                if isinstance(part, Residual):
                    for numbers in list_tensors(getattr(part.value, "x", part.value)):
                        self._note("hidden states", numbers)
                elif name in ON_ALL_RANKS and isinstance(part, Tensor):
                    self._note("selection" if "select" in name else "hidden states or logits", part)
            return result

        return watched

    def _find_module(self, args: Sequence[Any]) -> str:
        given = sorted(list_tensors(args), key=lambda t: t.ndim == 1)  # a norm may be the next block's
        return next((self._names[id(t)] for t in given if id(t) in self._names), "").rpartition(".")[0]

    def _note(self, what: str, numbers: Tensor) -> None:
        self._labels.append(f"{what} of {self._module or 'the embedding'}")
        self._sums.append(take_checksum(numbers))

    def compare(self, tokens: Iterable[int]) -> RankDifference | None:
        """What differs first in the step that has ended, whose tokens are given; None if nothing. All ranks ask."""
        labels = [*self._labels, "tokens"]
        sums = torch.stack(self._sums).tolist() if self._sums else []
        sums.append(hash(tuple(tokens)) & 0xFFFFFFFF)  # of integers: the same in every process
        self._labels.clear()
        self._sums.clear()
        everyone = [text.split() for text in self._ranks.collect(" ".join(map(str, sums)))]
        for place, label in enumerate(labels):
            for rank, each in enumerate(everyone):
                if each[place : place + 1] != everyone[0][place : place + 1]:
                    return RankDifference(rank, f"computes otherwise than rank 0: the first that differ are {label}")
        return None


def take_checksum(numbers: Tensor) -> Tensor:
    """i64 [], of every bit and its place."""
    if numbers.is_floating_point():
        numbers = numbers.float().contiguous().view(torch.int32)
    flat = numbers.reshape(-1).long()
    return (flat * (torch.arange(len(flat), device=flat.device) % PRIME + 1)).sum()
