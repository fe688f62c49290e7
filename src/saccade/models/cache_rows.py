"""What a request leaves behind, layer by layer: rows of the paged cache a token, and states. Numbers, no tensors.

`shape_layer` is the one place that says which tensors hold that, with shapes and dtypes: whoever allocates a cache and
whoever counts its bytes asks it. Next: dsa/cache_rows.py says it of a family, engine/pages.py makes tensors of it,
plan/show.py prints it.
"""

from collections.abc import Iterable, Mapping
from math import ceil, prod
from typing import NamedTuple

from saccade.base.values import show
from saccade.errors import ConfigError

POOL_NUMBERS = {"auto": "BF16", "float32": "F32"}  # what pools of numbers hold in a dtype
NUMBER_BYTES = {"BF16": 2, "F32": 4, "F8_E4M3": 1}  # by safetensors' spelling
CACHE_NUMBERS = ("bf16", "fp8")  # "bf16" stands for numbers of the dtype: F32 in "float32"
# Keys and values that attention of a prompt makes from latents at a time, of as many heads as fit: 16 heads of 16,384
# positions in BF16, or of 8,192 as two BF16 numbers each (kernels/attention/expand.py).
EXPANDED_BYTES = 1 << 27


class State(NamedTuple):
    """A tensor that a request has once, however many tokens it has: a running sum, the last inputs of a convolution.
    Zero before the request's first token."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "F32"  # in any dtype of the pools; see NUMBER_BYTES


class LayerCache(NamedTuple):
    """What a layer keeps: numbers of a latent and of an index key a token, 0 for none, and states a request."""

    latent: int = 0
    index_key: int = 0
    states: tuple[State, ...] = ()
    pool: int = 1  # tokens that share an index key
    rope: int = 0  # of a latent's numbers the last ones, which are rotated, and stay numbers with latent_cache="fp8"


class CacheTensor(NamedTuple):
    """A tensor of a cache that may not be there yet."""

    shape: tuple[int, ...]
    dtype: str  # see NUMBER_BYTES

    @property
    def bytes(self) -> int:
        return prod(self.shape) * NUMBER_BYTES[self.dtype]


class LayerTensors(NamedTuple):
    """All that a layer's cache consists of."""

    latent: tuple[CacheTensor, ...]  # numbers; or codes, what is rotated, scales: as kernels/types.py has Latents
    index_keys: tuple[CacheTensor, ...]  # numbers; or codes, scales: as IndexKeys; () for a layer without
    states: Mapping[str, CacheTensor]

    @property
    def bytes(self) -> int:
        return sum(tensor.bytes for tensor in (*self.latent, *self.index_keys, *self.states.values()))


def check_caches(index_cache: object, latent_cache: object) -> None:
    """ConfigError for another than CACHE_NUMBERS."""
    for name, value in (("index_cache", index_cache), ("latent_cache", latent_cache)):
        if not (isinstance(value, str) and value in CACHE_NUMBERS):
            raise ConfigError(f'{name}: expected "bf16" or "fp8", found {show(value)}')


def shape_layer(
    layer: LayerCache,
    tokens: int,
    dtype: str,
    index_cache: str = "bf16",
    latent_cache: str = "bf16",
    requests: int = 0,
) -> LayerTensors:
    """The tensors that hold `tokens` tokens and the states of `requests` requests. ConfigError for other caches than
    those above.

    In FP8 a latent and an index key are e4m3 codes, each with one f32 scale; what is rotated of a latent stays numbers.
    """
    check_caches(index_cache, latent_cache)
    number, keys = POOL_NUMBERS[dtype], tokens // layer.pool
    latent: tuple[CacheTensor, ...] = (CacheTensor((tokens, layer.latent), number),)
    if latent_cache == "fp8" and layer.latent:
        codes = CacheTensor((tokens, layer.latent - layer.rope), "F8_E4M3")
        latent = (codes, CacheTensor((tokens, layer.rope), number), CacheTensor((tokens,), "F32"))
    index_keys: tuple[CacheTensor, ...] = ()
    if layer.index_key:
        coded = (CacheTensor((keys, layer.index_key), "F8_E4M3"), CacheTensor((keys,), "F32"))
        index_keys = coded if index_cache == "fp8" else (CacheTensor((keys, layer.index_key), number),)
    states = {state.name: CacheTensor((requests, *state.shape), state.dtype) for state in layer.states}
    return LayerTensors(latent, index_keys, states)


def count_latent_bytes(layer: LayerCache, dtype: str, latent_cache: str = "bf16") -> int:
    """Bytes of a token's latent: 1,152 of 512 + 64 numbers in BF16, 644 in FP8."""
    return sum(tensor.bytes for tensor in shape_layer(layer, 1, dtype, latent_cache=latent_cache).latent)


def count_key_bytes(layer: LayerCache, dtype: str, index_cache: str = "bf16") -> int:
    """Bytes of an index key, which `layer.pool` tokens share: 256 of 128 numbers in BF16, 132 in FP8."""
    return sum(tensor.bytes for tensor in shape_layer(layer, layer.pool, dtype, index_cache).index_keys)


def count_token_bytes(
    layers: Iterable[LayerCache], dtype: str, index_cache: str = "bf16", latent_cache: str = "bf16"
) -> int:
    """Bytes of one token over all layers, of each layer rounded up. ConfigError for other caches than those above."""
    return sum(
        count_latent_bytes(layer, dtype, latent_cache) + ceil(count_key_bytes(layer, dtype, index_cache) / layer.pool)
        for layer in layers
    )


def count_state_bytes(layers: Iterable[LayerCache]) -> int:
    """Bytes of one request's states over all layers."""
    one = (shape_layer(layer, 0, "auto", requests=1) for layer in layers)
    return sum(state.bytes for layer in one for state in layer.states.values())
