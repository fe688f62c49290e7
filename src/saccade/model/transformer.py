"""The transformer, from token ids to logits: the forward pass in the order in which it happens.

What a layer needs is an argument: the batch says which tokens, the cache what came before, and the selection, where
to look, is handed from layer to layer. Knows no files and no requests. Next: decoder.py, mtp.py.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saccade.config import ModelConfig
from saccade.kernels import reference
from saccade.kernels.reference import Selection
from saccade.model.decoder import DecoderLayer
from saccade.model.layers import Ops, RmsNorm
from saccade.model.mtp import Mtp
from saccade.model.rope import RotaryEmbedding

if TYPE_CHECKING:
    from saccade.batch import Batch
    from saccade.cache import Cache
    from saccade.weights import Weights


class Transformer:
    """`mtp` is the MTP layer, or None if its weights were not loaded."""

    def __init__(self, config: ModelConfig, weights: "Weights", ops: Ops = reference):
        self.config, self.ops = config, ops
        self.embed_tokens = weights.take("model.embed_tokens")  # [vocab, hidden]
        self.rotary = RotaryEmbedding(config, self.embed_tokens.device)
        self.layers = [DecoderLayer(config, weights, i, ops) for i in range(config.num_hidden_layers)]
        self.norm = RmsNorm(weights, "model.norm", config.rms_norm_eps, ops)
        self.lm_head = weights.matrix("lm_head")  # [vocab, hidden]
        self.mtp: Mtp | None = None
        if weights.has(f"model.layers.{config.num_hidden_layers}.eh_proj"):
            self.mtp = Mtp(config, weights, self.embed_tokens, self.lm_head, ops)

    def forward(self, batch: "Batch", cache: "Cache", capture: list[Selection] | None = None) -> Tensor:
        """The hidden state after the final norm, [T, hidden]; writes the tokens' rows into the cache.

        `capture`, if given, receives each layer's selection, i32 [T, min(index_topk, P * PAGE)].
        """
        # fp32 from here on: against bf16 the error of auto falls 1.5 to 16 times, for 28 kB a token (docs/log.md).
        x = self.embed_tokens[batch.tokens].float()  # [T, hidden]
        rotation = self.rotary(batch.positions)
        selection: Selection | None = None
        for i, layer in enumerate(self.layers):
            shared = None if self.config.has_indexer(i) else selection
            x, selection = layer(x, rotation, batch, cache, shared)
            if capture is not None:
                capture.append(selection)
        return self.norm(x)

    def logits(self, rows: Tensor) -> Tensor:
        """f32 [L, vocab] of rows [L, hidden] of what `forward` returned."""
        return self.ops.linear(rows, self.lm_head, torch.float32, precise=True)
