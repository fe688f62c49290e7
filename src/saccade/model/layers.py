"""The small layers that others are made of, and the type of `ops`. Next: decoder.py puts them together."""

from types import ModuleType
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from saccade.weights import Weights

Ops = ModuleType  # kernels/reference.py, or a module with the same functions


class RmsNorm:
    """x / rms(x) * weight, in fp32, rounded to the dtype of x."""

    def __init__(self, weights: "Weights", name: str, eps: float, ops: Ops):
        self.weight, self.eps, self.ops = weights.take(name + ".weight"), eps, ops

    def __call__(self, x: Tensor) -> Tensor:
        return self.ops.rms_norm(x, self.weight, self.eps)


class Mlp:
    """down(silu(gate(x)) * up(x)): the dense layers', and the shared experts'."""

    def __init__(self, weights: "Weights", prefix: str, ops: Ops):
        self.ops = ops
        self.gate_up_proj = weights.matrix(prefix + "gate_up_proj")  # [2 * intermediate, hidden]
        self.down_proj = weights.matrix(prefix + "down_proj")  # [hidden, intermediate]

    def __call__(self, x: Tensor) -> Tensor:
        return self.ops.mlp(x, self.gate_up_proj, self.down_proj)
