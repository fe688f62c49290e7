"""What one token leaves in the cache, layer by layer: numbers and bytes, no tensors.

Next: engine/pages.py makes pools of it, plan/show.py prints it.
"""

from saccade.base.values import show
from saccade.config.model import ModelConfig
from saccade.errors import ConfigError

BYTES = {"auto": 2, "float32": 4}  # of a number in the pools of a dtype
INDEX_CACHES = ("bf16", "fp8")  # "bf16" stands for numbers of the dtype: F32 in "float32"
FP8_SCALE_BYTES = 4  # a key in FP8 has one f32 scale


def check_index_cache(index_cache: object) -> None:
    if not (isinstance(index_cache, str) and index_cache in INDEX_CACHES):
        raise ConfigError(f'index_cache: expected "bf16" or "fp8", found {show(index_cache)}')


def widths(config: ModelConfig, mtp: bool) -> list[tuple[int, int]]:
    """(latent, index key) values a token, for each layer; no index keys where a layer shares a selection."""
    latent = config.kv_lora_rank + config.qk_rope_head_dim
    layers = config.num_hidden_layers + mtp
    return [(latent, config.index_head_dim if config.has_indexer(i) else 0) for i in range(layers)]


def count_token_bytes(config: ModelConfig, dtype: str, mtp: bool, index_cache: str = "bf16") -> int:
    """Bytes of one token over all layers. ConfigError for another `index_cache` than those above."""
    check_index_cache(index_cache)
    total = 0
    for latent, keys in widths(config, mtp):
        total += latent * BYTES[dtype]
        if keys:
            total += keys + FP8_SCALE_BYTES if index_cache == "fp8" else keys * BYTES[dtype]
    return total
