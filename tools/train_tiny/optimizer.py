"""Muon for the matrices, Adam for tables and vectors.

Muon (K. Jordan, 2024) steps along the orthogonalised momentum: every direction of a matrix moves equally far. On a
model this small it needs about half of Adam's steps. All state is in `state`, tensors by name, for saving.
"""

import torch
from torch import Tensor

from tools.train_tiny.weights import FIXED, group_by_shape, is_matrix, stack, unstack

MOMENTUM = 0.95
BETAS = (0.9, 0.98)
DECAY = 0.02  # of matrices, times the learning rate


class Optimizer:
    """`step(rate)` uses the weights' .grad; `rate` is the matrices' learning rate, tables follow in proportion."""

    def __init__(self, weights: dict[str, Tensor], table_rate: float = 0.15):
        self.weights, self.table_rate = weights, table_rate
        trained = [name for name in weights if not name.endswith(FIXED)]
        self.groups = group_by_shape(weights, [n for n in trained if is_matrix(n, weights[n])])
        self.tables = [n for n in trained if not is_matrix(n, weights[n])]
        self.state: dict[str, Tensor] = {}
        for i, names in enumerate(self.groups):
            self.state[f"momentum.{i}"] = torch.zeros_like(stack(weights[n].detach() for n in names))
        for name in self.tables:
            for moment in ("first", "second"):
                self.state[f"{moment}.{name}"] = torch.zeros_like(weights[name])
        self.count = 0

    @torch.no_grad()
    def step(self, rate: float) -> None:
        self.count += 1
        for i, names in enumerate(self.groups):
            weights = [self.weights[n] for n in names]
            gradient = stack(w.grad for w in weights)  # type: ignore[arg-type]
            momentum = self.state[f"momentum.{i}"].lerp_(gradient, 1 - MOMENTUM)
            update = orthogonalize(gradient.lerp(momentum, MOMENTUM))
            update *= max(1.0, update.shape[-2] / update.shape[-1]) ** 0.5
            torch._foreach_mul_(weights, 1 - rate * DECAY)
            torch._foreach_add_(weights, unstack(update, weights), alpha=-rate)
        self._step_tables(rate * self.table_rate)

    def _step_tables(self, rate: float) -> None:
        weights = [self.weights[n] for n in self.tables]
        gradients = [w.grad for w in weights]
        first = [self.state[f"first.{n}"] for n in self.tables]
        second = [self.state[f"second.{n}"] for n in self.tables]
        torch._foreach_lerp_(first, gradients, 1 - BETAS[0])
        torch._foreach_mul_(second, BETAS[1])
        torch._foreach_addcmul_(second, gradients, gradients, 1 - BETAS[1])
        size = torch._foreach_sqrt(second)
        torch._foreach_mul_(size, (1 - BETAS[1] ** self.count) ** -0.5)
        torch._foreach_add_(size, 1e-10)
        torch._foreach_addcdiv_(weights, first, size, -rate / (1 - BETAS[0] ** self.count))


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
