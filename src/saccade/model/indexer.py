"""The lightning indexer: a small attention that only decides where the real one looks.

Each token leaves one short key in the cache. A later token scores them all, cheaply, and keeps the best `index_topk`.
Key and head weights come from one matrix, `wk_weights_proj`: how the checkpoint stored its two halves, FP8 with a
scale over BF16, is long forgotten here. Where the pool holds FP8 keys, queries are quantised as well. Next:
`index_logits` and `select` in kernels/reference.py.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saccade.config import ModelConfig
from saccade.kernels import PAGE
from saccade.kernels.reference import Rotation, Selection
from saccade.model.layers import Ops

if TYPE_CHECKING:
    from saccade.batch import Batch
    from saccade.cache import Keys
    from saccade.weights import Weights

EPS = 1e-6  # of k_norm; GLM's too, whose rms_norm_eps is 1e-5


class Indexer:
    """score(t, s) = sum over heads of relu(q_t . k_s) * w_t, for s <= t; the best `index_topk` are selected."""

    def __init__(self, config: ModelConfig, weights: "Weights", prefix: str, ops: Ops):
        self.ops = ops
        self.wq_b = weights.matrix(prefix + "wq_b")  # [heads * dim, q_lora_rank]
        self.wk_weights_proj = weights.take(prefix + "wk_weights_proj")  # [dim + heads, hidden]
        self.k_norm_weight = weights.take(prefix + "k_norm.weight")  # [dim]
        self.k_norm_bias = weights.take(prefix + "k_norm.bias")  # [dim]
        self.heads, self.dim, self.topk = config.index_n_heads, config.index_head_dim, config.index_topk
        self.rope, self.interleaved = config.qk_rope_head_dim, config.indexer_rope_interleave
        self.scale = self.heads**-0.5 * self.dim**-0.5

    def __call__(self, x: Tensor, q_latent: Tensor, rotation: Rotation, batch: "Batch", keys: "Keys") -> Selection:
        """Write the keys of x [T, hidden] into the pool `keys`, then select: i32 [T, min(index_topk, P * PAGE)].

        q_latent: the normalised low-rank query [T, q_lora_rank], which MLA shares.
        """
        k, weights = self.project(x).split([self.dim, self.heads], dim=1)
        k = self.ops.layer_norm(k, self.k_norm_weight, self.k_norm_bias, EPS)
        k = self.rotate(k, rotation)  # fp32 until here: [T, dim]
        if keys.scales is not None:
            k, k_scales = self.ops.quantize_rows(k)
            self.ops.write_rows(keys.scales, batch.slots, k_scales)
        self.ops.write_rows(keys.data, batch.slots, k)

        context = batch.page_table.shape[1] * PAGE
        if context <= self.topk:
            return self.ops.select_all(batch.positions, context)
        q = self.ops.linear(q_latent, self.wq_b, precise=True).unflatten(1, (self.heads, self.dim))  # [T, heads, dim]
        q, weights = self.rotate(q, rotation), weights * self.scale
        if keys.scales is not None:
            q, q_scales = self.ops.quantize_rows(q)
            weights = weights * q_scales  # [T, heads]
        where = batch.page_table, batch.request, batch.positions
        logits = self.ops.index_logits(q, weights, keys.data, *where, key_scales=keys.scales)
        return self.ops.select(logits, batch.positions, self.topk)

    def project(self, x: Tensor) -> Tensor:
        """Key and head weights of each token, f32 [T, dim + heads], in one product."""
        return self.ops.linear(x, self.wk_weights_proj, torch.float32, precise=True)

    def rotate(self, x: Tensor, rotation: Rotation) -> Tensor:
        """RoPE on the first dimensions: MLA has it on the last."""
        turned = self.ops.rotate(x[..., : self.rope], rotation, self.interleaved)
        return torch.cat([turned, x[..., self.rope :]], dim=-1)
