"""The multi-token-prediction layer: from the hidden state at a token and the next token, a guess at the one after.

A decoder block of its own behind the last main layer, with its own indexer, selection and cache (DeepSeek-V3 report,
section 2.2). It shares the embedding and the head of the main model where the checkpoint ships none. Knows nothing of
drafts and acceptance. Next: decoder.py.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saccade.config import ModelConfig
from saccade.kernels.types import Matrix
from saccade.kernels.reference import Selection
from saccade.model.decoder import DecoderLayer
from saccade.model.layers import Ops, RmsNorm
from saccade.model.rope import RotaryEmbedding

if TYPE_CHECKING:
    from saccade.batch import Batch
    from saccade.cache import Cache
    from saccade.weights import Weights


class Mtp:
    def __init__(self, config: ModelConfig, weights: "Weights", embed_tokens: Tensor, lm_head: Matrix, ops: Ops):
        layer = config.num_hidden_layers
        prefix = f"model.layers.{layer}."
        has_embedding, has_head = weights.has(prefix + "embed_tokens"), weights.has(prefix + "shared_head.head")
        self.ops = ops
        self.embed_tokens = weights.take(prefix + "embed_tokens") if has_embedding else embed_tokens
        self.embed_norm = RmsNorm(weights, prefix + "enorm", config.rms_norm_eps, ops)
        self.hidden_norm = RmsNorm(weights, prefix + "hnorm", config.rms_norm_eps, ops)
        self.eh_proj = weights.matrix(prefix + "eh_proj")  # [hidden, 2 * hidden]
        self.layer = DecoderLayer(config, weights, layer, ops)
        self.norm = RmsNorm(weights, prefix + "shared_head.norm", config.rms_norm_eps, ops)
        self.head = weights.matrix(prefix + "shared_head.head") if has_head else lm_head
        self.rotary = RotaryEmbedding(config, self.embed_tokens.device)

    def forward(
        self,
        batch: "Batch",
        next_tokens: Tensor,
        hidden: Tensor,
        cache: "Cache",
        selection: Selection | None = None,
    ) -> tuple[Tensor, Selection]:
        """One draft step: hidden state [T, hidden] after `shared_head.norm`, and the selection.

        At position i of `batch` stand t[i + 1] in `next_tokens` [T] and h[i] in `hidden` [T, hidden]: for the first
        step the main model's state after its final norm, for the next ones the state that this function returned.
        A `selection` that is passed is used as it is, and no index keys are written (config
        `index_share_for_mtp_iteration`, from the second step on): the next first step writes them.
        """
        embedded = self.embed_norm(self.embed_tokens[next_tokens].float())
        x = self.ops.linear(torch.cat([embedded, self.hidden_norm(hidden)], dim=1), self.eh_proj)
        x, selection = self.layer(x, self.rotary(batch.positions), batch, cache, selection)
        return self.norm(x), selection

    def logits(self, rows: Tensor) -> Tensor:
        """f32 [L, vocab] of rows [L, hidden] that `forward` returned."""
        return self.ops.linear(rows, self.head, torch.float32, precise=True)
