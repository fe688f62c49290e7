"""The transformer, from token ids to logits: the forward pass in the order in which it happens.

What a layer needs is an argument. The step says which tokens run and what came before them. The selection says where to
look, and passes from layer to layer. `ops` alone says how things are computed. Knows no files and no requests. Next:
decoder.py, mtp.py.
"""

from collections.abc import Callable
from copy import copy
from typing import TYPE_CHECKING

from torch import Tensor

from saccade.kernels.types import Selection
from saccade.models.dsa.begin_step import begin_step
from saccade.models.dsa.config import ModelConfig
from saccade.models.dsa.decoder import DecoderLayer
from saccade.models.dsa.layers import take_embedding, take_head, take_norm
from saccade.models.dsa.mtp import Mtp
from saccade.models.dsa.rope import RotaryEmbedding
from saccade.ops.interface import Ops, Residual
from saccade.ops.step import Batch, Cache, Step

if TYPE_CHECKING:
    from saccade.weights.weights import Weights

# What layer i gets instead of (its input, the selection it was given): for those who compare two ways to compute.
Steer = Callable[[int, Residual, Selection | None, Step], tuple[Residual, Selection | None]]


class Transformer:
    """`mtp` is the MTP layer, or None if its weights were not loaded."""

    def __init__(self, config: ModelConfig, weights: "Weights", ops: Ops):
        self.config, self.ops = config, ops
        self.embed_tokens = take_embedding(config, weights, "model.embed_tokens")
        self.rotary = RotaryEmbedding(config, self.embed_tokens.rows.device)
        self.layers = [DecoderLayer(config, weights, i) for i in range(config.num_hidden_layers)]
        self.norm = take_norm(weights, "model.norm", config.rms_norm_eps)
        self.lm_head = take_head(config, weights, "lm_head")
        self.mtp: Mtp | None = None
        if weights.has(f"model.layers.{config.num_hidden_layers}.eh_proj"):
            self.mtp = Mtp(config, weights, self.embed_tokens, self.lm_head, self.rotary, ops)

    def with_ops(self, ops: Ops) -> "Transformer":
        """The same parameters, computed by other operations."""
        other = copy(self)
        other.ops = ops
        other.mtp = None if self.mtp is None else self.mtp.with_ops(ops)
        return other

    def forward(
        self, batch: Batch, cache: Cache, capture: list[Selection] | None = None, steer: Steer | None = None
    ) -> Tensor:
        """The hidden state after the final norm, f32 [T, hidden]; writes the tokens' rows into the cache.

        `capture`, if given, receives each layer's selection, i32 [T, min(index_topk, P * PAGE)].
        """
        return self.ops.normalize(self.run(batch, cache, capture, steer), self.norm)

    def run(
        self, batch: Batch, cache: Cache, capture: list[Selection] | None = None, steer: Steer | None = None
    ) -> Residual:
        """What the final norm takes."""
        ops, norms = self.ops.for_batch(batch), [layer.input_norm for layer in self.layers] + [self.norm]
        embedding = self.embed_tokens, self.rotary, norms[0]
        x, step = begin_step(ops, batch, cache, batch.tokens, *embedding, self.config.index_topk)
        selection: Selection | None = None
        for i, layer in enumerate(self.layers):
            given = None if self.config.has_indexer(i) else selection
            if steer is not None:
                x, given = steer(i, x, given, step)
            x, selection = layer(ops, x, step, given, norms[i + 1])
            if capture is not None:
                capture.append(selection)
        return x

    def logits(self, rows: Tensor) -> Tensor:
        """f32 [L, vocab] of rows [L, hidden] of what `forward` returned."""
        return self.ops.logits(rows, self.lm_head)

    def find_logits(self, batch: Batch, cache: Cache) -> Tensor:
        """f32 [T, vocab] of every token of a step: `forward` and `logits`, the norm in between in the head's launch."""
        return self.ops.for_batch(batch).project_head(self.run(batch, cache), self.norm, self.lm_head)
