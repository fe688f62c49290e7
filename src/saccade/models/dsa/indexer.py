"""The lightning indexer: a small attention that only decides where the real one looks.

Each token leaves one short key in the cache. A later token scores them all, cheaply, and keeps the best `index_topk`:
score(t, s) = sum over heads of relu(q_t . k_s) * w_t, for s <= t. Key and head weights come from one BF16
matrix, `wk_weights_proj`, however the checkpoint stored its two halves. Next: attention.py uses it; `index_logits` and
`select` in kernels/reference.py are its arithmetic.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from saccade.kernels.types import CacheRows, KeyNorm
from saccade.models.dsa.config import ModelConfig
from saccade.models.dsa.layers import take_fused
from saccade.ops.interface import Fused, IndexerShape
from saccade.ops.step import Cache

if TYPE_CHECKING:
    from saccade.weights.weights import Weights

EPS = 1e-6  # of k_norm; GLM's too, whose rms_norm_eps is 1e-5


class Indexer:
    """Parameters of one layer's indexer."""

    def __init__(self, config: ModelConfig, weights: "Weights", prefix: str):
        self.wq_b = weights.matrix(prefix + "wq_b")  # [heads * dim, q_lora_rank]
        norm = weights.take(prefix + "k_norm.weight"), weights.take(prefix + "k_norm.bias")  # [dim] each
        self.key_norm = KeyNorm(*norm, EPS, config.indexer_rope_interleave)
        heads, dim = config.index_n_heads, config.index_head_dim
        self.projection = self.take_projection(config, weights, prefix)._replace(is_exact=True)
        scale = heads**-0.5 * dim**-0.5
        shape = (heads, dim, config.index_topk, config.qk_rope_head_dim)
        self.index = IndexerShape(*shape, config.indexer_rope_interleave, scale)

    def take_projection(self, config: ModelConfig, weights: "Weights", prefix: str) -> Fused:
        """Keys and, last, weights of heads: always one BF16 matrix."""
        return take_fused(weights, prefix + "wk_weights_proj", config.index_head_dim, config.index_n_heads)

    def make_rows(self, rows: CacheRows, projected: Sequence[Tensor], cache: Cache, layer: int) -> CacheRows:
        """`rows` with what `projection` gave, but for the weights of heads, and where it goes."""
        return rows._replace(key=projected[0], key_norm=self.key_norm, keys=cache.index_keys[layer])
