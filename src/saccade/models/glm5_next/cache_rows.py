"""What GLM-5.3-Flash leaves behind: latents and pool keys a token where a layer attends, states a request elsewhere.

An attending layer keeps the keys of its latest tokens as well, until their pool is complete. Next: transformer.py.
"""

from saccade.models.cache_rows import LayerCache, State
from saccade.models.glm5_next.config import FlashConfig
from saccade.models.parameters import Layout, share

TAKEN_BACK = 6  # tokens that may be written and taken back: a step verifies one and five drafts


def cache_rows(config: FlashConfig, mtp: bool, at: Layout = Layout()) -> list[LayerCache]:
    """Of each layer, the MTP layer last. Of a recurrent layer a rank keeps the states of its own heads."""
    return [find_kept(config, at, i) for i in range(config.num_hidden_layers + mtp)]


def find_kept(c: FlashConfig, at: Layout, layer: int) -> LayerCache:
    if c.is_recurrent(layer):
        first, last = share(c.linear_num_heads, at.tp, at.rank)
        heads, dim = last - first, c.linear_head_dim
        ring = TAKEN_BACK + c.linear_conv_kernel_dim - 1
        recent = State("recent", (ring, 4 * heads * dim + heads))
        return LayerCache(states=(State("matrix", (heads, dim, dim)), State("base", (heads,)), recent))
    if not c.has_indexer(layer):
        return LayerCache(c.kv_lora_rank)
    recent = State("recent", (c.index_kpool + TAKEN_BACK, 2 * c.index_head_dim))
    return LayerCache(c.kv_lora_rank, c.index_head_dim, (recent,), c.index_kpool)
