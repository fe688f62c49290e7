"""Operations that note what they select, and others that go on with it: near ties then change nothing behind them."""

from typing import Any

from torch import Tensor

from saccade.kernels import reference as plain
from saccade.kernels.types import Norm, Selection
from saccade.ops.gpu import Gpu
from saccade.ops.interface import IndexerShape, Moe, Residual, Routed
from saccade.ops.reference import Reference
from saccade.ops.step import Step


class Given(Gpu):
    """A GPU's operations, which select for themselves and go on with what they are given: in steps of many tokens,
    inputs keep other bits than the reference's, and a near tie may fall to the other side."""

    def __init__(self, given: list[Selection], activations: str = "exact") -> None:
        super().__init__(activations=activations)
        self.given, self.recall = given, list[float]()

    def select(self, step: Step, logits: Tensor, queries: Any, index: IndexerShape) -> tuple[Selection, Any]:
        own, queries = super().select(step, logits, queries, index)
        wanted = self.given.pop(0)
        self.recall.append(float((own == wanted).float().mean()))
        return wanted, queries


class Noting(Reference):
    """The reference's operations, and what they selected."""

    def __init__(self, activations: str = "exact") -> None:
        super().__init__(activations=activations)
        self.seen: list[Selection] = []

    def select(self, step: Step, logits: Tensor, queries: Any, index: IndexerShape) -> tuple[Selection, Any]:
        selection, queries = super().select(step, logits, queries, index)
        self.seen.append(selection)
        return selection, queries


class RoundingExperts(Noting):
    """The same, but routed experts meet inputs rounded to BF16, as moe/grouped_gemm.py rounds them beside BF16 weights:
    what is left between the two is no rounding."""

    def add_experts(self, x: Residual, norm: Norm, routed: Routed, moe: Moe, following: Norm) -> Residual:
        h, (experts, weights) = routed.value, routed.chosen
        added = plain.gated_mlp(h, *moe.shared)
        gate_up, down = plain.decode(moe.gate_up), plain.decode(moe.down)
        for token in range(len(h)):
            for expert, weight in zip(experts[token], weights[token], strict=True):
                hidden = plain.silu_and_mul(gate_up[expert] @ h[token].bfloat16().float())
                added[token] += weight * (down[expert] @ hidden.bfloat16().float())
        return Residual(x.value + added, following)
