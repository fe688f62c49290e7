"""What a request leaves behind, layer by layer: rows of the paged cache a token, and states. Numbers, no tensors.

Next: dsa/cache_rows.py says it of a family, engine/pages.py makes tensors of it, plan/show.py prints it.
"""

from collections.abc import Iterable
from math import ceil, prod
from typing import NamedTuple

from saccade.base.values import show
from saccade.errors import ConfigError

NUMBER_BYTES = {"auto": 2, "float32": 4}  # of a number in the pools of a dtype
STATE_BYTES = {"BF16": 2, "F32": 4}  # of a number in a state, in any dtype
CACHE_NUMBERS = ("bf16", "fp8")  # "bf16" stands for numbers of the dtype: F32 in "float32"
FP8_SCALE_BYTES = 4  # a key or a latent in FP8 has one f32 scale
# Keys and values that attention of a prompt makes from latents at a time, of as many heads as fit: 16 heads of 16,384
# positions in BF16, or of 8,192 as two BF16 numbers each (kernels/attention/expand.py).
EXPANDED_BYTES = 1 << 27


class State(NamedTuple):
    """A tensor that a request has once, however many tokens it has: a running sum, the last inputs of a convolution.
    Zero before the request's first token."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "F32"  # safetensors spelling, see STATE_BYTES


class LayerCache(NamedTuple):
    """What a layer keeps: numbers of a latent and of an index key a token, 0 for none, and states a request."""

    latent: int = 0
    index_key: int = 0
    states: tuple[State, ...] = ()
    pool: int = 1  # tokens that share an index key
    rope: int = 0  # of a latent's numbers the last ones, which are rotated, and stay numbers with latent_cache="fp8"


def check_caches(index_cache: object, latent_cache: object) -> None:
    """ConfigError for another than CACHE_NUMBERS."""
    for name, value in (("index_cache", index_cache), ("latent_cache", latent_cache)):
        if not (isinstance(value, str) and value in CACHE_NUMBERS):
            raise ConfigError(f'{name}: expected "bf16" or "fp8", found {show(value)}')


def count_latent_bytes(layer: LayerCache, dtype: str, latent_cache: str = "bf16") -> int:
    """Bytes of a token's latent: 1,152 of 512 + 64 numbers in BF16, 644 in FP8."""
    if latent_cache != "fp8" or not layer.latent:
        return layer.latent * NUMBER_BYTES[dtype]
    return layer.latent - layer.rope + FP8_SCALE_BYTES + layer.rope * NUMBER_BYTES[dtype]


def count_key_bytes(layer: LayerCache, dtype: str, index_cache: str = "bf16") -> int:
    """Bytes of an index key, which `layer.pool` tokens share: 256 of 128 numbers in BF16, 132 in FP8."""
    if index_cache != "fp8" or not layer.index_key:
        return layer.index_key * NUMBER_BYTES[dtype]
    return layer.index_key + FP8_SCALE_BYTES


def count_token_bytes(
    layers: Iterable[LayerCache], dtype: str, index_cache: str = "bf16", latent_cache: str = "bf16"
) -> int:
    """Bytes of one token over all layers. ConfigError for other caches than those above."""
    check_caches(index_cache, latent_cache)
    return sum(
        count_latent_bytes(layer, dtype, latent_cache) + ceil(count_key_bytes(layer, dtype, index_cache) / layer.pool)
        for layer in layers
    )


def count_state_bytes(layers: Iterable[LayerCache]) -> int:
    """Bytes of one request's states over all layers."""
    return sum(prod(state.shape) * STATE_BYTES[state.dtype] for layer in layers for state in layer.states)
