"""Operations that note what they select, and others that go on with it: near ties then change nothing behind them."""

from typing import Any

from torch import Tensor

from saccade.kernels.types import Selection
from saccade.ops.gpu import Gpu
from saccade.ops.interface import IndexerShape
from saccade.ops.reference import Reference
from saccade.ops.step import Step


class Given(Gpu):
    """A GPU's operations, which select for themselves and go on with what they are given: in steps of many tokens,
    inputs keep other bits than the reference's, and a near tie may fall to the other side."""

    def __init__(self, given: list[Selection], is_exact: bool = True) -> None:
        super().__init__(is_exact)
        self.given, self.recall = given, list[float]()

    def select(self, step: Step, logits: Tensor, queries: Any, index: IndexerShape) -> tuple[Selection, Any]:
        own, queries = super().select(step, logits, queries, index)
        wanted = self.given.pop(0)
        self.recall.append(float((own == wanted).float().mean()))
        return wanted, queries


class Noting(Reference):
    """The reference's operations, and what they selected."""

    def __init__(self) -> None:
        self.seen: list[Selection] = []

    def select(self, step: Step, logits: Tensor, queries: Any, index: IndexerShape) -> tuple[Selection, Any]:
        selection, queries = super().select(step, logits, queries, index)
        self.seen.append(selection)
        return selection, queries
