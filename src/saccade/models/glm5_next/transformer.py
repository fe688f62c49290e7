"""GLM-5.3-Flash, from token ids to logits: the forward pass in the order in which it happens.

As models/dsa/transformer.py, whose attention, indexer, experts and MTP layer it uses, but for the residual: four
streams, read by `enter` and added to behind each block; and most layers are recurrent. Next: interface.py.
"""

from copy import copy
from typing import TYPE_CHECKING

from torch import Tensor

from saccade.kernels.recurrent.delta import DeltaState, DeltaWeights
from saccade.kernels.types import CacheRows, Norm, Pooling, Selection, StreamMixer
from saccade.models.dsa.attention import Attention
from saccade.models.dsa.begin_step import begin_step
from saccade.models.dsa.decoder import DecoderLayer
from saccade.models.dsa.indexer import Indexer
from saccade.models.dsa.layers import take_embedding, take_feed_forward, take_fused, take_head, take_norm
from saccade.models.dsa.mtp import Mtp
from saccade.models.dsa.rope import RotaryEmbedding
from saccade.models.dsa.transformer import Steer
from saccade.models.glm5_next.config import FlashConfig
from saccade.models.glm5_next.interface import FlashOps, Recurrence
from saccade.ops.interface import Fused, Moe, Residual
from saccade.ops.step import Batch, Cache, Step

if TYPE_CHECKING:
    from collections.abc import Sequence

    from saccade.models.dsa.config import ModelConfig
    from saccade.weights.weights import Weights


class PoolIndexer(Indexer):
    """An indexer whose keys are pooled: key, gate and weights come from one BF16 matrix."""

    def __init__(self, config: "ModelConfig", weights: "Weights", prefix: str):
        assert isinstance(config, FlashConfig)
        super().__init__(config, weights, prefix)
        self.bias = weights.take(prefix + "index_kpool_compress_ape")  # [tokens of a pool, dim]
        self.index = self.index._replace(pool=config.index_kpool)

    def take_projection(self, config: "ModelConfig", weights: "Weights", prefix: str) -> Fused:
        dim = config.index_head_dim
        return take_fused(weights, prefix + "wk_gate_weights_proj", dim, dim, config.index_n_heads)

    def make_rows(self, rows: CacheRows, projected: "Sequence[Tensor]", cache: Cache, layer: int) -> CacheRows:
        key, gate = projected
        pooling = Pooling(self.index.pool, self.bias, gate, cache.states[layer]["recent"])
        return super().make_rows(rows, [key], cache, layer)._replace(pooling=pooling)


class RecurrentBlock:
    """In the place of attention: needs no selection and makes none."""

    def __init__(self, config: FlashConfig, weights: "Weights", prefix: str, layer: int):
        decay, dim = weights.take(prefix + "A_log"), config.linear_head_dim
        heads = len(decay)  # of this rank
        conv, bias = weights.take(prefix + "conv1d.weight"), weights.take(prefix + "dt_bias")
        self.layer = layer
        self.recurrence = Recurrence(
            take_fused(weights, prefix + "in_proj", 3 * heads * dim, heads, dim, dim),
            weights.matrix(prefix + "f_b_proj"),
            weights.matrix(prefix + "g_b_proj"),
            DeltaWeights(conv, decay, bias, config.linear_lower_bound, heads, dim),
            take_norm(weights, prefix + "o_norm", config.rms_norm_eps),
        )
        self.o_proj = weights.matrix(prefix + "o_proj")  # [hidden, heads * dim]

    def attend(
        self, ops: FlashOps, x: Residual, norm: Norm, step: Step, given: Selection | None
    ) -> tuple[Tensor, Selection | None]:
        """What `o_proj` takes, and the selection, which passes by."""
        return ops.recur(step, x, norm, self.recurrence, DeltaState(**step.cache.states[self.layer])), given


class FlashLayer:
    """One block of the streams: attention or recurrence, then an MLP or a mixture of experts."""

    def __init__(self, config: FlashConfig, weights: "Weights", layer: int):
        prefix, eps = f"model.layers.{layer}.", config.rms_norm_eps
        self.mixer = take_mixer(config, weights, prefix + "hc_attn_")
        self.input_norm = take_norm(weights, prefix + "input_layernorm", eps)
        self.block: Attention | RecurrentBlock
        if config.is_recurrent(layer):
            self.block = RecurrentBlock(config, weights, prefix + "self_attn.", layer)
        else:
            self.block = Attention(config, weights, prefix + "self_attn.", layer, PoolIndexer)
        self.mlp_mixer = take_mixer(config, weights, prefix + "hc_ffn_")
        self.mlp_norm = take_norm(weights, prefix + "post_attention_layernorm", eps)
        self.mlp = take_feed_forward(config, weights, prefix + "mlp.", layer)

    def __call__(
        self, ops: FlashOps, x: Residual, step: Step, given: Selection | None, following: Norm
    ) -> tuple[Residual, Selection | None]:
        """The streams behind the block, and the selection: `given`, or its indexer's."""
        norm, mlp = self.mlp_norm, self.mlp
        x = ops.enter(x, self.mixer, self.input_norm)
        seen, given = self.block.attend(ops, x, self.input_norm, step, given)
        x = ops.enter(ops.add_projection(x, seen, self.block.o_proj, norm), self.mlp_mixer, norm)
        if isinstance(mlp, Moe):
            return ops.add_experts(x, norm, ops.route(x, norm, mlp), mlp, following), given
        return ops.add_mlp(x, norm, mlp, following), given


def take_mixer(config: FlashConfig, weights: "Weights", prefix: str) -> StreamMixer:
    fn, base, scale = (weights.take(prefix + name) for name in ("fn", "base", "scale"))
    sinkhorn = config.hc_sinkhorn_iters, config.hc_eps
    return StreamMixer(fn, base, scale, config.hc_mult, *sinkhorn, config.rms_norm_eps)


def make_draft_layer(config: FlashConfig, weights: "Weights", layer: int) -> DecoderLayer:
    """The MTP layer's block: attention with pools, experts, one residual stream."""
    return DecoderLayer(config, weights, layer, PoolIndexer)


class FlashModel:
    """`mtp` is the MTP layer, or None if its weights were not loaded."""

    def __init__(self, config: FlashConfig, weights: "Weights", ops: FlashOps):
        self.config, self.ops = config, ops
        self.embed_tokens = take_embedding(config, weights, "model.embed_tokens")
        self.rotary = RotaryEmbedding(config, self.embed_tokens.rows.device)  # of no dimensions
        self.layers = [FlashLayer(config, weights, i) for i in range(config.num_hidden_layers)]
        self.norm = take_norm(weights, "model.norm", config.rms_norm_eps)
        self.lm_head = take_head(config, weights, "lm_head")
        self.mtp: Mtp | None = None
        if weights.has(f"model.layers.{config.num_hidden_layers}.eh_proj"):
            self.mtp = Mtp(config, weights, self.embed_tokens, self.lm_head, self.rotary, ops, make_draft_layer)

    def with_ops(self, ops: FlashOps) -> "FlashModel":
        """The same parameters, computed by other operations."""
        other = copy(self)
        other.ops = ops
        other.mtp = None if self.mtp is None else self.mtp.with_ops(ops)
        return other

    def forward(
        self, batch: Batch, cache: Cache, capture: list[Selection] | None = None, steer: Steer | None = None
    ) -> Tensor:
        """The hidden state after the final norm, f32 [T, hidden]; writes the tokens' rows and states.

        `capture`, if given, receives the selection of each layer that attends, i32 [T, K].
        """
        ops = self.ops.for_batch(batch)
        norms = [layer.input_norm for layer in self.layers] + [self.norm]
        embedding = self.embed_tokens, self.rotary, norms[0]
        x, step = begin_step(ops, batch, cache, batch.tokens, *embedding, self.config.index_topk)
        selection: Selection | None = None
        for i, layer in enumerate(self.layers):
            given = None if self.config.has_indexer(i) else selection
            if steer is not None:
                x, given = steer(i, x, given, step)
            x, selection = layer(ops, x, step, given, norms[i + 1])
            if capture is not None and selection is not None and not self.config.is_recurrent(i):
                capture.append(selection)
        return ops.normalize(ops.merge(x), self.norm)

    def logits(self, rows: Tensor) -> Tensor:
        """f32 [L, vocab] of rows [L, hidden] of what `forward` returned."""
        return self.ops.logits(rows, self.lm_head)

    def find_logits(self, batch: Batch, cache: Cache) -> Tensor:
        """f32 [T, vocab] of every token of a step."""
        return self.logits(self.forward(batch, cache))
