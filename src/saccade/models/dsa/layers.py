"""Parameters by their names in the checkpoint, as the operations take them. Next: decoder.py puts them together."""

from typing import TYPE_CHECKING

from saccade.kernels.types import Mlp, Norm, Routing
from saccade.models.dsa.config import ModelConfig
from saccade.ops.interface import Embedding, Fused, Head, Moe

if TYPE_CHECKING:
    from saccade.weights.weights import Weights


def take_norm(weights: "Weights", name: str, eps: float) -> Norm:
    return Norm(weights.take(name + ".weight"), eps)


def take_embedding(config: ModelConfig, weights: "Weights", name: str) -> Embedding:
    return Embedding(weights.take(name), config.vocab_size)


def take_head(config: ModelConfig, weights: "Weights", name: str) -> Head:
    return Head(weights.matrix(name), config.vocab_size)


def take_fused(weights: "Weights", name: str, *rows: int) -> Fused:
    """A matrix and the rows of each projection in it; without any, all are one."""
    matrix = weights.matrix(name)
    return Fused(matrix, rows or (matrix.data.shape[0],))


def take_feed_forward(config: ModelConfig, weights: "Weights", prefix: str, layer: int) -> Mlp | Moe:
    """What stands behind a layer's attention."""
    if config.is_sparse(layer):
        return take_moe(config, weights, prefix)
    return take_mlp(weights, prefix, config.swiglu_limit)


def take_mlp(weights: "Weights", prefix: str, limit: float) -> Mlp:
    """A dense layer's, or the shared experts'."""
    return Mlp(weights.matrix(prefix + "gate_up_proj"), weights.matrix(prefix + "down_proj"), limit)


def take_moe(config: ModelConfig, weights: "Weights", prefix: str) -> Moe:
    """A router, `num_experts_per_tok` routed experts for each token, and the shared experts for all."""
    c, limit = config, config.swiglu_limit
    router, bias = weights.matrix(prefix + "gate"), weights.take(prefix + "gate.e_score_correction_bias")
    routing = Routing(bias, c.n_group, c.topk_group, c.num_experts_per_tok, c.routed_scaling_factor)
    experts = weights.matrix(prefix + "experts.gate_up_proj"), weights.matrix(prefix + "experts.down_proj")
    return Moe(router, routing, take_mlp(weights, prefix + "shared_experts.", limit), *experts, limit)
