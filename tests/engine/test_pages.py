"""Pools of the cache: zeros that cost a CPU's memory only where something was written."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from published_configs import glm53_flash_config
from tiny_models import tiny_config

from saccade.config.file import Config
from saccade.engine.pages import ALIGNMENT, allocate_cache, count_cache_bytes, count_page_bytes, make_zeros, shape_cache
from saccade.kernels import PAGE
from saccade.models.cache_rows import count_state_bytes
from saccade.models.registry import find_cache_rows, make_config


def read_own_memory() -> int:
    """Bytes of this process that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float32])
def test_a_large_cache_costs_what_is_used_of_it(dtype: torch.dtype) -> None:
    before = read_own_memory()
    pool = make_zeros((1 << 22, 256), dtype, "cpu")  # 1 to 4 GB
    assert (pool.shape, pool.dtype, pool.is_contiguous(), pool.data_ptr() % 64) == ((1 << 22, 256), dtype, True, 0)
    pool[[3, 1 << 21, -1]] = torch.ones(3, 256).to(dtype)
    assert pool[[0, 3, 4, 1 << 21, -2, -1]].float().sum(1).tolist() == [0, 256, 0, 256, 0, 256]
    assert read_own_memory() - before < 64 << 20


def test_pools_of_nothing_are_there() -> None:
    assert make_zeros((128, 0), torch.bfloat16, "cpu").shape == (128, 0)


def test_pools_are_zeros_where_others_have_been() -> None:
    """Memory that is new to the process is zeros anyway; a small pool gets what was given back before."""
    for _ in range(8):
        np.full(64 * 64 + ALIGNMENT, 255, dtype=np.uint8)
        assert not make_zeros((64, 64), torch.uint8, "cpu").any()


def find_config(pool: int | None) -> Config:
    """GLM-5.3-Flash's, with pools of so many tokens, or a small DeepSeek-V3.2's."""
    if pool is None:
        return tiny_config(num_hidden_layers=2)
    published = glm53_flash_config()
    published["text_config"]["index_kpool"] = pool
    return make_config(json.dumps(published).encode())


@pytest.mark.parametrize("caches", [("bf16", "bf16"), ("fp8", "bf16"), ("fp8", "fp8")])
@pytest.mark.parametrize("dtype", ["auto", "float32"])
@pytest.mark.parametrize("pool", [None, 4, 16])
def test_bytes_are_counted_of_the_tensors_that_are_made(pool: int | None, dtype: str, caches: tuple[str, str]) -> None:
    """Codes and scales, keys that tokens share, and states included. 16 do not divide the bytes of an FP8 key."""
    config, (index_cache, latent_cache) = find_config(pool), caches
    cache = allocate_cache(config, 5, dtype, "cpu", False, index_cache, 3, latent_cache=latent_cache)
    pools = [x for pool in (*cache.latent, *cache.index_keys) if pool is not None for x in pool if x is not None]
    states = [state for layer in cache.states for state in layer.values()]
    made = sum(x.nbytes for x in (*pools, *states))
    assert count_cache_bytes(shape_cache(config, 5, dtype, False, index_cache, 3, latent_cache=latent_cache)) == made
    pages = 5 * count_page_bytes(config, dtype, False, index_cache, latent_cache)
    assert pages + 4 * count_state_bytes(find_cache_rows(config, False)) == made
    assert {len(keys.data) for keys in cache.index_keys if keys} == {5 * PAGE // (pool or 1)}
    assert bool(states) == (pool is not None)
