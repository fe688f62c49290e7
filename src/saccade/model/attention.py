"""Multi-head latent attention, absorbed, over the tokens that the indexer selected.

The cache holds one latent and one rotated key a token, shared by all heads: queries are taken into the latent space by
`w_uk` and the result out of it by `w_uv`, so no key or value is ever expanded. Next: indexer.py chooses the tokens,
`sparse_attention` in kernels/reference.py reads them.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saccade.config import ModelConfig
from saccade.kernels.reference import Rotation, Selection
from saccade.model.indexer import Indexer
from saccade.model.layers import Ops, RmsNorm

if TYPE_CHECKING:
    from saccade.batch import Batch
    from saccade.cache import Cache
    from saccade.weights import Weights


class Attention:
    """Given a selection, attends over it; given None, asks its own indexer first. Returns the selection it used."""

    def __init__(self, config: ModelConfig, weights: "Weights", prefix: str, layer: int, ops: Ops):
        self.ops, self.layer = ops, layer
        self.qkv_a_proj = weights.matrix(prefix + "qkv_a_proj")  # [q_lora + kv_lora + rope, hidden]
        self.q_a_norm = RmsNorm(weights, prefix + "q_a_layernorm", config.latent_norm_eps, ops)
        self.kv_a_norm = RmsNorm(weights, prefix + "kv_a_layernorm", config.latent_norm_eps, ops)
        self.q_b_proj = weights.matrix(prefix + "q_b_proj")  # [heads * (nope + rope), q_lora]
        self.w_uk = weights.take(prefix + "w_uk")  # [heads, nope, kv_lora]
        self.w_uv = weights.take(prefix + "w_uv")  # [heads, v, kv_lora]
        self.o_proj = weights.matrix(prefix + "o_proj")  # [hidden, heads * v]
        self.indexer = Indexer(config, weights, prefix + "indexer.", ops) if config.has_indexer(layer) else None
        self.q_lora, self.kv_lora = config.q_lora_rank, config.kv_lora_rank
        self.nope, self.rope = config.qk_nope_head_dim, config.qk_rope_head_dim
        self.scale = config.softmax_scale

    def __call__(
        self, x: Tensor, rotation: Rotation, batch: "Batch", cache: "Cache", selection: Selection | None
    ) -> tuple[Tensor, Selection]:
        ops, pool = self.ops, cache.latent[self.layer]
        low = ops.linear(x, self.qkv_a_proj, precise=True)  # the indexer's queries come from it
        q_latent, latent, k_rope = low.split([self.q_lora, self.kv_lora, self.rope], dim=1)
        q_latent = self.q_a_norm(q_latent)
        row = torch.cat([self.kv_a_norm(latent), ops.rotate(k_rope, rotation, True)], dim=1)
        ops.write_rows(pool, batch.slots, row)  # [T, kv_lora + rope]

        if selection is None:
            keys = cache.index_keys[self.layer]
            assert self.indexer is not None and keys is not None, "a layer that shares a selection was given none"
            selection = self.indexer(x, q_latent, rotation, batch, keys)

        q = ops.linear(q_latent, self.q_b_proj).unflatten(1, (-1, self.nope + self.rope))  # [T, heads, nope + rope]
        q_nope, q_rope = q.split([self.nope, self.rope], dim=2)
        absorbed = ops.linear(q_nope.transpose(0, 1), self.w_uk.transpose(1, 2)).transpose(0, 1)  # [T, heads, kv_lora]
        q = torch.cat([absorbed, ops.rotate(q_rope, rotation, True)], dim=2)
        seen = ops.sparse_attention(q, pool, batch.page_table, batch.request, selection, self.scale, self.kv_lora)
        out = ops.linear(seen.transpose(0, 1), self.w_uv).transpose(0, 1)  # [T, heads, v]
        return ops.linear(out.flatten(1), self.o_proj, precise=True), selection
