"""What the layers of a step have in common, however many tokens it has. Next: fast.py, fast_many.py."""

from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from saccade.kernels import PAGE, gpu
from saccade.kernels.attention.cache_rows import Entry, KeyNorm
from saccade.kernels.moe.router import Routing
from saccade.kernels.reference import Rotation, Selection, select_all
from saccade.kernels.indexer.logits import index_logits
from saccade.kernels.residual import Norm
from saccade.model.attention import Attention
from saccade.model.indexer import EPS as KEY_EPS
from saccade.model.indexer import Indexer
from saccade.model.layers import RmsNorm
from saccade.model.moe import MixtureOfExperts

if TYPE_CHECKING:
    from saccade.batch import Batch
    from saccade.cache import Cache


class Step(NamedTuple):
    """What all layers of a step have in common."""

    batch: "Batch"
    cache: "Cache"
    rotation: Rotation
    everything: Selection | None  # that a token may see, where no context is longer than a selection

    def entry(self, a: Attention, key: Tensor | None = None) -> Entry:
        """What layer `a` leaves of its tokens in the cache; an index key too if there is one, f32 [T, dim]."""
        known = (take_norm(a.kv_a_norm), self.rotation, self.batch.slots, self.cache.latent[a.layer])
        if key is None or a.indexer is None:
            return Entry(*known)
        keys, i = self.cache.index_keys[a.layer], a.indexer
        assert keys is not None
        norm = KeyNorm(i.k_norm_weight, i.k_norm_bias, KEY_EPS, i.interleaved)
        return Entry(*known, key, norm, keys.data, keys.scales)

    def score(self, a: Attention, indexer: Indexer, q: Tensor, weights: Tensor) -> Tensor:
        """f32 [T, S]: how much a layer's tokens want to see each position up to their own; what follows it is not
        written. q: index queries f32 [T, heads * dim], not rotated yet; weights: f32 [T, heads]."""
        keys, batch = self.cache.index_keys[a.layer], self.batch
        assert keys is not None
        q, where = q.unflatten(1, (indexer.heads, indexer.dim)), (batch.page_table, batch.request, batch.positions)
        if keys.scales is not None:
            codes, scales = gpu.quantize_rows(indexer.rotate(q, self.rotation))
            weights = weights * scales * indexer.scale
            return index_logits(codes, weights, keys.data, *where, key_scales=keys.scales, fills=False)
        return index_logits(
            q, weights, keys.data, *where, rotation=self.rotation, interleaved=indexer.interleaved,
            scale=indexer.scale, fills=False,
        )  # fmt: skip


def take_norm(norm: RmsNorm) -> Norm:
    return Norm(norm.weight, norm.eps)


def select_everything(batch: "Batch", topk: int) -> Selection | None:
    """What every layer selects where the context is no longer than a selection; else None."""
    context = batch.page_table.shape[1] * PAGE
    if context > topk:
        return None
    return select_all(batch.positions, context)


def find_routing(mlp: MixtureOfExperts) -> Routing:
    c = mlp.config
    return Routing(mlp.gate_bias, c.n_group, c.topk_group, c.num_experts_per_tok, c.routed_scaling_factor)
