"""Multi-head latent attention, absorbed, over the tokens that the indexer selected.

The cache holds one latent and one rotated key a token, shared by all heads: queries are taken into the latent space by
`w_uk` and the result out of it by `w_uv`, so no key or value is ever expanded. Next: indexer.py, decoder.py.
"""

from typing import TYPE_CHECKING, Any

from torch import Tensor

from saccade.kernels.types import CacheRows, Norm, Selection
from saccade.models.dsa.config import ModelConfig
from saccade.models.dsa.indexer import Indexer
from saccade.models.dsa.layers import take_fused, take_norm
from saccade.ops.interface import Ops, QueryWeights, Residual
from saccade.ops.step import Step

if TYPE_CHECKING:
    from saccade.weights.weights import Weights


class Attention:
    """Given a selection, attends over it; given None, asks its own indexer first."""

    def __init__(
        self, config: ModelConfig, weights: "Weights", prefix: str, layer: int, indexer: type[Indexer] = Indexer
    ):
        """`indexer`: of the family."""
        self.layer = layer
        self.qkv_a_proj = take_fused(weights, prefix + "qkv_a_proj")  # [q_lora + kv_lora + rope, hidden], read whole
        self.kv_a_norm = take_norm(weights, prefix + "kv_a_layernorm", config.latent_norm_eps)
        q_norm, q_b = (
            take_norm(weights, prefix + "q_a_layernorm", config.latent_norm_eps),
            weights.matrix(prefix + "q_b_proj"),
        )
        self.queries = QueryWeights(q_norm, q_b, weights.take(prefix + "w_uk"))
        self.w_uv = weights.take(prefix + "w_uv")  # [heads, v, kv_lora]
        self.o_proj = weights.matrix(prefix + "o_proj")  # [hidden, heads * v]
        self.indexer = indexer(config, weights, prefix + "indexer.") if config.has_indexer(layer) else None
        self.scale = config.softmax_scale

    def __call__(
        self, ops: Ops, x: Residual, norm: Norm, step: Step, given: Selection | None, following: Norm
    ) -> tuple[Residual, Selection]:
        """x + attention(norm(x)), and the selection it used: `given`, or its indexer's."""
        seen, selection = self.attend(ops, x, norm, step, given)
        return ops.add_projection(x, seen, self.o_proj, following), selection

    def attend(
        self, ops: Ops, x: Residual, norm: Norm, step: Step, given: Selection | None
    ) -> tuple[Tensor, Selection]:
        """What `o_proj` takes, and the selection."""
        queries, selection = self.find_selection(ops, x, norm, step, given)
        latent = step.cache.latent[self.layer]
        return ops.attend(step, queries, selection, latent, self.w_uv, self.scale), selection

    def find_selection(
        self, ops: Ops, x: Residual, norm: Norm, step: Step, given: Selection | None
    ) -> tuple[Any, Selection]:
        """Queries, and which tokens they see; writes the step's rows into the cache. A function of its own, because the
        logits of 4,096 tokens over a context of 131,072 take 2 GB, which are freed when it returns."""
        pool = step.cache.latent[self.layer]
        if given is not None:
            (low,) = ops.project(x, norm, [self.qkv_a_proj])
            return ops.make_queries(step, low, self.queries, CacheRows(self.kv_a_norm, pool)), given
        indexer = self.indexer
        assert indexer is not None, "a layer that shares a selection was given none"
        low, *projected, weights = ops.project(x, norm, [self.qkv_a_proj, indexer.projection])
        rows = indexer.make_rows(CacheRows(self.kv_a_norm, pool), projected, step.cache, self.layer)
        if step.everything is not None:
            return ops.make_queries(step, low, self.queries, rows), step.everything
        queries = ops.make_queries(step, low, self.queries._replace(wq_b=indexer.wq_b), rows)
        logits = ops.score(step, queries, weights, rows, indexer.index)
        selection, queries = ops.select(step, logits, queries, indexer.index)
        return queries, selection
