"""One block of the transformer: attention, then an MLP or a mixture of experts, each around the residual stream.

The main layers and the MTP layer are the same block. Next: attention.py, moe.py.
"""

from typing import TYPE_CHECKING

from torch import Tensor

from saccade.config import ModelConfig
from saccade.kernels.reference import Rotation, Selection
from saccade.model.attention import Attention
from saccade.model.layers import Mlp, Ops, RmsNorm
from saccade.model.moe import MixtureOfExperts

if TYPE_CHECKING:
    from saccade.batch import Batch
    from saccade.cache import Cache
    from saccade.weights import Weights


class DecoderLayer:
    def __init__(self, config: ModelConfig, weights: "Weights", layer: int, ops: Ops):
        prefix = f"model.layers.{layer}."
        self.input_norm = RmsNorm(weights, prefix + "input_layernorm", config.rms_norm_eps, ops)
        self.attention = Attention(config, weights, prefix + "self_attn.", layer, ops)
        self.post_attention_norm = RmsNorm(weights, prefix + "post_attention_layernorm", config.rms_norm_eps, ops)
        self.mlp: Mlp | MixtureOfExperts
        if config.is_sparse(layer):
            self.mlp = MixtureOfExperts(config, weights, prefix + "mlp.", ops)
        else:
            self.mlp = Mlp(weights, prefix + "mlp.", ops)

    def __call__(
        self, x: Tensor, rotation: Rotation, batch: "Batch", cache: "Cache", selection: Selection | None
    ) -> tuple[Tensor, Selection]:
        """x [T, hidden] -> the same, and the selection it used: the one given, or, given None, its indexer's."""
        seen, selection = self.attention(self.input_norm(x), rotation, batch, cache, selection)
        x = x + seen
        return x + self.mlp(self.post_attention_norm(x)), selection
