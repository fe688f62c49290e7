"""What operations ask of the ranks that compute one model together.

A rank holds a share of the model (models/parameters.py, `Layout`). Only the operations that add a partial result to the
residual, look up the vocabulary or give logits talk to other ranks (ops/interface.py). Everything else is computed by
every rank from equal bits, so all ranks have equal bits. `Ranks` is an argument of the operations, never a global.
Next: ops/reference.py.
"""

from typing import Protocol

from torch import Tensor

from saccade.models.parameters import Layout


class Ranks(Protocol):
    """The ranks of one model, as one of them sees them. All ranks call the same methods in the same order."""

    layout: Layout

    def add_up(self, part: Tensor) -> Tensor:
        """The sum of every rank's `part`, in rank order: the same bits on every rank. May write over `part`."""
        ...

    def gather(self, part: Tensor, width: int) -> Tensor:
        """[T, width]: every rank's `part` [T, its share of width] side by side, in rank order."""
        ...

    def collect(self, text: str) -> list[str]:
        """Every rank's `text`, in rank order: for what one rank alone can see, and all must decide by."""
        ...

    def check(self) -> None:
        """RankError if a sum waited for a rank in vain. To be asked when a step's tokens have come."""
        ...


class OneRank:
    """A model on one rank: nothing to add, nothing to gather, and no bit changes."""

    layout = Layout()

    def add_up(self, part: Tensor) -> Tensor:
        return part

    def gather(self, part: Tensor, width: int) -> Tensor:
        return part

    def collect(self, text: str) -> list[str]:
        return [text]

    def check(self) -> None: ...


ONE_RANK = OneRank()
