"""Pools of the cache: zeros that cost a CPU's memory only where something was written."""

from pathlib import Path

import numpy as np
import pytest
import torch

from saccade.engine.pages import ALIGNMENT, make_zeros


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
