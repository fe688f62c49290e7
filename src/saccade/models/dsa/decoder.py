"""One block of the transformer: attention, then an MLP or a mixture of experts, each around the residual stream.

The main layers and the MTP layer are the same block. Next: attention.py, layers.py.
"""

from typing import TYPE_CHECKING

from saccade.kernels.types import Norm, Selection
from saccade.models.dsa.attention import Attention
from saccade.models.dsa.config import ModelConfig
from saccade.models.dsa.indexer import Indexer
from saccade.models.dsa.layers import take_feed_forward, take_norm
from saccade.ops.interface import Moe, Ops, Residual
from saccade.ops.step import Step

if TYPE_CHECKING:
    from saccade.weights.weights import Weights


class DecoderLayer:
    def __init__(self, config: ModelConfig, weights: "Weights", layer: int, indexer: type[Indexer] = Indexer):
        prefix, eps = f"model.layers.{layer}.", config.rms_norm_eps
        self.input_norm = take_norm(weights, prefix + "input_layernorm", eps)
        self.attention = Attention(config, weights, prefix + "self_attn.", layer, indexer)
        self.post_attention_norm = take_norm(weights, prefix + "post_attention_layernorm", eps)
        self.mlp = take_feed_forward(config, weights, prefix + "mlp.", layer)

    def __call__(
        self, ops: Ops, x: Residual, step: Step, given: Selection | None, following: Norm
    ) -> tuple[Residual, Selection]:
        """The residual behind the block, for the norm that follows; and the selection: `given`, or its indexer's."""
        norm, mlp = self.post_attention_norm, self.mlp
        x, selection = self.attention(ops, x, self.input_norm, step, given, norm)
        if isinstance(mlp, Moe):
            return ops.add_experts(x, norm, ops.route(x, norm, mlp), mlp, following), selection
        return ops.add_mlp(x, norm, mlp, following), selection
