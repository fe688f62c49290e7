"""What a request leaves behind, layer by layer: rows of the paged cache a token, and states. Numbers, no tensors.

Next: dsa/cache_rows.py says it of a family, engine/pages.py makes tensors of it, plan/show.py prints it.
"""

from collections.abc import Iterable
from math import prod
from typing import NamedTuple

from saccade.base.values import show
from saccade.errors import ConfigError

NUMBER_BYTES = {"auto": 2, "float32": 4}  # of a number in the pools of a dtype
STATE_BYTES = {"BF16": 2, "F32": 4}  # of a number in a state, in any dtype
INDEX_CACHES = ("bf16", "fp8")  # "bf16" stands for numbers of the dtype: F32 in "float32"
FP8_SCALE_BYTES = 4  # a key in FP8 has one f32 scale
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


def check_index_cache(index_cache: object) -> None:
    if not (isinstance(index_cache, str) and index_cache in INDEX_CACHES):
        raise ConfigError(f'index_cache: expected "bf16" or "fp8", found {show(index_cache)}')


def count_token_bytes(layers: Iterable[LayerCache], dtype: str, index_cache: str = "bf16") -> int:
    """Bytes of one token over all layers. ConfigError for another `index_cache` than those above."""
    check_index_cache(index_cache)
    total = 0
    for latent, keys, _, pool in layers:
        total += latent * NUMBER_BYTES[dtype]
        if keys:
            key = keys + FP8_SCALE_BYTES if index_cache == "fp8" else keys * NUMBER_BYTES[dtype]
            total += -(-key // pool)
    return total


def count_state_bytes(layers: Iterable[LayerCache]) -> int:
    """Bytes of one request's states over all layers."""
    return sum(prod(state.shape) * STATE_BYTES[state.dtype] for layer in layers for state in layer.states)
