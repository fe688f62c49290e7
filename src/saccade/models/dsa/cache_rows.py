"""What a token of a DSA model leaves in the cache: a latent a layer, and an index key where there is an indexer."""

from saccade.models.cache_rows import LayerCache
from saccade.models.dsa.config import ModelConfig
from saccade.models.parameters import Layout


def cache_rows(config: ModelConfig, mtp: bool, at: Layout = Layout()) -> list[LayerCache]:
    """Of each layer, the MTP layer last; no index keys where a layer shares a selection. All heads read one latent, so
    every rank keeps all of it."""
    rope, layers = config.qk_rope_head_dim, config.num_hidden_layers + mtp
    keys = [config.index_head_dim if config.has_indexer(i) else 0 for i in range(layers)]
    return [LayerCache(config.kv_lora_rank + rope, key, rope=rope) for key in keys]
