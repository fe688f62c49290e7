"""The multi-token-prediction layer: from the hidden state at a token and the next token, a guess at the one after.

A decoder block of its own behind the last main layer, with its own indexer, selection and cache (DeepSeek-V3 report,
section 2.2). It shares the embedding and the head of the main model where the checkpoint ships none. Knows nothing of
drafts and acceptance. Next: decoder.py.
"""

from collections.abc import Callable
from copy import copy
from typing import TYPE_CHECKING, Any

from torch import Tensor

from saccade.kernels.types import Selection
from saccade.models.dsa.begin_step import begin_step
from saccade.models.dsa.config import ModelConfig
from saccade.models.dsa.decoder import DecoderLayer
from saccade.models.dsa.layers import take_embedding, take_head, take_norm
from saccade.models.dsa.rope import RotaryEmbedding
from saccade.ops.interface import Embedding, Head, Ops
from saccade.ops.step import Batch, Cache

if TYPE_CHECKING:
    from saccade.weights.weights import Weights


class Mtp:
    def __init__(
        self, config: ModelConfig, weights: "Weights", embed_tokens: Embedding, lm_head: Head, rotary: RotaryEmbedding,
        ops: Ops, decoder: Callable[[Any, "Weights", int], DecoderLayer] = DecoderLayer,
    ):  # fmt: skip
        """`decoder` makes the block, given the config, the weights and the layer."""
        layer, eps = config.num_hidden_layers, config.rms_norm_eps
        prefix = f"model.layers.{layer}."
        self.config, self.rotary, self.ops = config, rotary, ops
        embedding, head = prefix + "embed_tokens", prefix + "shared_head.head"
        self.embed_tokens = take_embedding(config, weights, embedding) if weights.has(embedding) else embed_tokens
        self.embed_norm = take_norm(weights, prefix + "enorm", eps)
        self.hidden_norm = take_norm(weights, prefix + "hnorm", eps)
        self.eh_proj = weights.matrix(prefix + "eh_proj")  # [hidden, 2 * hidden]
        self.layer = decoder(config, weights, layer)
        self.norm = take_norm(weights, prefix + "shared_head.norm", eps)
        self.head = take_head(config, weights, head) if weights.has(head) else lm_head

    def with_ops(self, ops: Ops) -> "Mtp":
        other = copy(self)
        other.ops = ops
        return other

    def forward(
        self, batch: Batch, next_tokens: Tensor, hidden: Tensor, cache: Cache, selection: Selection | None = None
    ) -> tuple[Tensor, Selection]:
        """One draft step: hidden state [T, hidden] after `shared_head.norm`, and the selection.

        At position i of `batch` stand t[i + 1] in `next_tokens` [T] and h[i] in `hidden` [T, hidden]: for the first
        step the main model's state after its final norm, for the next ones the state that this function returned.
        A `selection` that is passed is used as it is, and no index keys are written (config
        `index_share_for_mtp_iteration`, from the second step on): the next first step writes them.
        """
        ops, first = self.ops.for_batch(batch), self.layer.input_norm
        embedding = self.embed_tokens, self.rotary, self.embed_norm
        embedded, step = begin_step(ops, batch, cache, next_tokens, *embedding, self.config.index_topk)
        x = ops.begin_draft(embedded, self.embed_norm, hidden, self.hidden_norm, self.eh_proj, first)
        x, selection = self.layer(ops, x, step, selection, self.norm)
        return ops.normalize(x, self.norm), selection

    def logits(self, rows: Tensor) -> Tensor:
        """f32 [L, vocab] of rows [L, hidden] that `forward` returned."""
        return self.ops.logits(rows, self.head)
