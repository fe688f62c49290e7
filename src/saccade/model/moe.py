"""Mixture of experts: a router, `num_experts_per_tok` routed experts for each token, and the shared experts for all.

Next: `route` and `expert_mlp` in kernels/reference.py.
"""

from typing import TYPE_CHECKING

from torch import Tensor

from saccade.config import ModelConfig
from saccade.model.layers import Mlp, Ops

if TYPE_CHECKING:
    from saccade.weights import Weights


class MixtureOfExperts:
    def __init__(self, config: ModelConfig, weights: "Weights", prefix: str, ops: Ops):
        self.ops, self.config = ops, config
        self.gate = weights.take(prefix + "gate")  # [experts, hidden]
        self.gate_bias = weights.take(prefix + "gate.e_score_correction_bias")  # f32 [experts]
        self.gate_up_proj = weights.matrix(prefix + "experts.gate_up_proj")  # [experts, 2 * n, hidden]
        self.down_proj = weights.matrix(prefix + "experts.down_proj")  # [experts, hidden, n]
        self.shared_experts = Mlp(weights, prefix + "shared_experts.", ops)

    def __call__(self, x: Tensor) -> Tensor:
        c = self.config
        experts, weights = self.ops.route(
            x, self.gate, self.gate_bias, c.n_group, c.topk_group, c.num_experts_per_tok, c.routed_scaling_factor
        )
        routed = self.ops.expert_mlp(x, experts, weights, self.gate_up_proj, self.down_proj)
        return routed + self.shared_experts(x)
