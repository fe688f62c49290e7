"""The cache: one pool of latents and one of index keys a layer, addressed by the same pages; and states of requests.

A page is PAGE tokens. Page 0 is never given to a request: rows of padding tokens land there. Which request owns which
page is the scheduler's business, unknown here. Rollback of rows costs nothing: those past a request's length are never
read. A state cannot be rolled back, only begun anew.
"""

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from saccade.config.file import Config
from saccade.kernels import PAGE
from saccade.kernels.types import IndexKeys, Latents
from saccade.models.cache_rows import CacheTensor, LayerTensors, shape_layer
from saccade.models.parameters import Layout
from saccade.models.registry import find_cache_rows
from saccade.ops.step import Cache

DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32, "F8_E4M3": torch.float8_e4m3fn}
ALIGNMENT = 64  # bytes, as torch aligns its own tensors


def allocate_cache(
    config: Config,
    pages: int,
    dtype: str,
    device: torch.device | str,
    mtp: bool,
    index_cache: str = "bf16",
    requests: int = 0,
    at: Layout = Layout(),
    latent_cache: str = "bf16",
) -> Cache:
    """Pools of `pages` pages, page 0 included, zeroed: a masked row is multiplied by 0, and 0 * NaN is NaN.

    `index_cache`, `latent_cache`: "fp8" keeps index keys, or latents but for their rope, as codes with scales, "bf16"
    as numbers of `dtype`. `requests`: that run at the same time; place 0 of each state is given to none, as page 0 is
    not.
    """
    layers = shape_cache(config, pages, dtype, mtp, index_cache, requests, at, latent_cache)

    def make(tensors: Iterable[CacheTensor]) -> list[Tensor]:
        return [make_zeros(tensor.shape, DTYPES[tensor.dtype], device) for tensor in tensors]

    states = tuple(dict(zip(layer.states, make(layer.states.values()), strict=True)) for layer in layers)
    latent = tuple(Latents(*make(layer.latent)) for layer in layers)
    keys = tuple(IndexKeys(*make(layer.index_keys)) if layer.index_keys else None for layer in layers)
    return Cache(latent, keys, states if any(states) else ())


def shape_cache(
    config: Config,
    pages: int,
    dtype: str,
    mtp: bool,
    index_cache: str = "bf16",
    requests: int = 0,
    at: Layout = Layout(),
    latent_cache: str = "bf16",
) -> list[LayerTensors]:
    """The tensors that `allocate_cache` makes of the same arguments, layer by layer."""
    return [
        shape_layer(layer, pages * PAGE, dtype, index_cache, latent_cache, requests + 1)
        for layer in find_cache_rows(config, mtp, at)
    ]


def make_zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Zeros. On a CPU the system gives a page of memory when it is first written to: a large cache costs what was used
    of it. (torch.zeros writes to all: 0.3 s and all of the memory for each GB.)"""
    if torch.device(device).type != "cpu":
        return torch.zeros(*shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    raw = np.zeros(size + ALIGNMENT, dtype=np.uint8)  # calloc
    start = -raw.ctypes.data % ALIGNMENT
    return torch.from_numpy(raw[start : start + size]).view(dtype).view(*shape)


def keep_states(cache: Cache) -> Callable[[], None]:
    """What makes all states again as they are now."""
    kept = [{name: state.clone() for name, state in layer.items()} for layer in cache.states]

    def restore() -> None:
        for layer, before in zip(cache.states, kept, strict=True):
            for name, state in layer.items():
                state.copy_(before[name])

    return restore


def clear_states(cache: Cache, slots: Sequence[int]) -> None:
    """Begin requests at these places of the states anew. Nothing is launched where there are no states."""
    if not (cache.states and slots):
        return
    for layer in cache.states:
        for state in layer.values():
            state[torch.tensor(slots, device=state.device)] = 0


def count_page_bytes(
    config: Config, dtype: str, mtp: bool, index_cache: str = "bf16", latent_cache: str = "bf16"
) -> int:
    """Bytes of one page over all layers."""
    layers = shape_cache(config, 1, dtype, mtp, index_cache, latent_cache=latent_cache)
    return count_cache_bytes(layer._replace(states={}) for layer in layers)


def count_cache_bytes(layers: Iterable[LayerTensors]) -> int:
    """Bytes of a cache of these tensors: see `shape_cache`."""
    return sum(layer.bytes for layer in layers)
