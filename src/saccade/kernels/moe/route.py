"""The router for a step of any size: the choice of mixture.py after a product of gemm.py.

In plain torch it is 15 passes over [tokens, experts]. What is chosen and why is in reference.py:route.
"""

import torch
from torch import Tensor

from saccade.kernels.linear.gemm import linear
from saccade.kernels.moe.router import Routing, choose


def route(
    x: Tensor, gate: Tensor, bias: Tensor, groups: int, topk_groups: int, topk: int, scaling: float
) -> tuple[Tensor, Tensor]:
    """Choose experts: (i64 [T, topk], f32 weights [T, topk]), best first."""
    if not x.shape[0]:
        return x.new_empty(0, topk, dtype=torch.int64), x.new_empty(0, topk, dtype=torch.float32)
    ids, weights = choose(linear(x, gate, torch.float32), Routing(bias, groups, topk_groups, topk, scaling))
    return ids.long(), weights
