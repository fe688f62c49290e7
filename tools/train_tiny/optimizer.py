"""Muon for the matrices, Adam for tables and vectors.

Muon (K. Jordan, 2024) steps along the orthogonalised momentum: every direction of a matrix moves equally far. On a
model this small it needs about half of Adam's steps. All state is in `state`, tensors by name, for saving.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from tools.train_tiny.weights import FIXED, group_by_shape, is_matrix, stack, unstack

MOMENTUM = 0.95
BETAS = (0.9, 0.98)
DECAY = 0.1  # of matrices, times the learning rate
# Orthogonal steps alone let attention's logits grow until each query sees one token and no gradient is left: after
# 1,400 steps all of layer 0 did. Muon with decay d keeps singular values below 1 / d; of these products, that bounds
# the logits.
QK = ("q_b_proj.weight", "kv_b_proj.weight", "kv_a_proj_with_mqa.weight")
QK_DECAY = 0.7


class Optimizer:
    """All of `step` is device work on tensors that stay, so that a CUDA graph can hold it."""

    def __init__(self, weights: dict[str, Tensor], table_rate: float = 0.15):
        self.weights, self.table_rate = weights, table_rate
        trained = [name for name in weights if not name.endswith(FIXED)]
        matrices = [n for n in trained if is_matrix(n, weights[n])]
        self.groups = [
            group
            for kind in (True, False)
            for group in group_by_shape(weights, [n for n in matrices if n.endswith(QK) is kind])
        ]
        self.tables = [n for n in trained if not is_matrix(n, weights[n])]
        self.state: dict[str, Tensor] = {}
        for i, names in enumerate(self.groups):
            self.state[f"momentum.{i}"] = torch.zeros_like(stack(weights[n].detach() for n in names))
        for name in self.tables:
            for moment in ("first", "second"):
                self.state[f"{moment}.{name}"] = torch.zeros_like(weights[name])

    def find_factors(self, rate: float, step: int) -> list[float]:
        """What `step` needs to know of the step's number, counted from 0: the rate of matrices, the rate of tables
        with the first moment's correction, and the second moment's."""
        n = step + 1
        return [rate, rate * self.table_rate / (1 - BETAS[0] ** n), (1 - BETAS[1] ** n) ** -0.5]

    @torch.no_grad()
    def step(self, gradients: Mapping[str, Tensor], factors: Tensor) -> None:
        """`factors`: f32 [3] on the device, from find_factors."""
        rate, table_rate, correction = factors.unbind()
        for i, names in enumerate(self.groups):
            weights = [self.weights[n] for n in names]
            gradient = stack(gradients[n].float() for n in names)
            momentum = self.state[f"momentum.{i}"].lerp_(gradient, 1 - MOMENTUM)
            update = orthogonalize(gradient.lerp(momentum, MOMENTUM))
            update *= max(1.0, update.shape[-2] / update.shape[-1]) ** 0.5
            decay = QK_DECAY if names[0].endswith(QK) else DECAY
            torch._foreach_mul_(weights, 1 - rate * decay)
            torch._foreach_sub_(weights, unstack(update * rate, weights))
        self._step_tables([gradients[n].float() for n in self.tables], table_rate, correction)

    def _step_tables(self, gradients: list[Tensor], rate: Tensor, correction: Tensor) -> None:
        weights = [self.weights[n] for n in self.tables]
        first = [self.state[f"first.{n}"] for n in self.tables]
        second = [self.state[f"second.{n}"] for n in self.tables]
        torch._foreach_lerp_(first, gradients, 1 - BETAS[0])
        torch._foreach_mul_(second, BETAS[1])
        torch._foreach_addcmul_(second, gradients, gradients, 1 - BETAS[1])
        size = torch._foreach_sqrt(second)
        torch._foreach_mul_(size, correction)
        torch._foreach_add_(size, 1e-10)
        change = torch._foreach_div(first, size)
        torch._foreach_mul_(change, rate)
        torch._foreach_sub_(weights, change)


def orthogonalize(m: Tensor) -> Tensor:
    """About U V^T of m = U S V^T, for each matrix of a stack: five steps of a quintic iteration in bf16."""
    x = m.bfloat16() if m.is_cuda else m
    is_tall = x.shape[-2] > x.shape[-1]
    x = x.mT if is_tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return (x.mT if is_tall else x).to(m.dtype)
