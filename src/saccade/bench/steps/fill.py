"""A cache as it is after a long prompt: real rows where that is cheap, their noisy copies where it is not.

The model itself prefills up to 8,192 random tokens once. The first request gets those rows as they are; other requests,
and positions further on, get them shifted and with 5 % noise, so that no two index keys are equal. Next: rig.py.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from saccade.bench.steps.eager import Forward, prefill, random_tokens
from saccade.engine.pages import allocate_cache
from saccade.kernels import PAGE, reference
from saccade.kernels.types import IndexKeys, Latents
from saccade.models.dsa.config import ModelConfig
from saccade.ops.step import Cache

REAL_TOKENS = 8192
FILL_CHUNK = 2048  # tokens of one prefill step
NOISE = 0.05
SHIFT = 977  # between requests; prime


class RequestRows(NamedTuple):
    """What a layer's cache holds of one request."""

    latent: Tensor  # [n, kv_lora + rope]
    keys: Tensor | None  # [n, index_head_dim]


@torch.inference_mode()
def prefill_rows(
    model: Forward, config: ModelConfig, context: int, dtype: str, device: torch.device
) -> list[RequestRows]:
    """What the model leaves in each layer's cache after min(context, REAL_TOKENS) random tokens."""
    count = min(context, REAL_TOKENS)
    pages = -(-count // PAGE)
    cache = allocate_cache(config, pages + 1, dtype, device, mtp=False)
    table = torch.arange(1, pages + 1, device=device)[None]
    prefill(model, cache, random_tokens(config.vocab_size, count, device), table, FILL_CHUNK)
    held = slice(PAGE, PAGE + count)
    return [
        RequestRows(latent.data[held], None if keys is None else keys.data[held])
        for latent, keys in zip(cache.latent, cache.index_keys, strict=True)
    ]


@torch.inference_mode()
def fill_caches(cache: Cache, page_table: Tensor, context: int, rows: list[RequestRows] | None) -> str:
    """Write `context` rows for each request of `page_table` [B, P]; without `rows`, normal numbers, which is what the
    norms in front of the cache would leave of random input. Returns what was written, in words."""
    device = page_table.device
    dice = torch.Generator(device).manual_seed(1)
    position = torch.arange(context, device=device)
    known = len(rows[0].latent) if rows else 0
    known_layers = max((i for i, row in enumerate(rows or ()) if row.keys is not None), default=0)
    for request, table in enumerate(page_table):
        slots = table[position // PAGE] * PAGE + position % PAGE
        for layer, pools in enumerate(zip(cache.latent, cache.index_keys, strict=True)):
            for kind, pool in enumerate(pools):
                if pool is None:
                    continue
                if rows is None:
                    width = pool.width if isinstance(pool, Latents) else pool.data.shape[1]
                    written = torch.randn(context, width, generator=dice, device=device)
                else:
                    held = rows[min(layer, known_layers)][kind]  # the MTP layer's are those of the last with keys
                    assert held is not None
                    written = held[(position + SHIFT * request) % known]
                    if request > 0 or context > known:
                        noise = torch.randn(written.shape, generator=dice, device=device)
                        written = written + NOISE * noise.to(written.dtype)
                write_pool(pool, slots, written)
    if rows is None:
        return "random normal rows"
    copies = f"; others are these, shifted, with {NOISE:.0%} noise" if len(page_table) > 1 or context > known else ""
    return f"rows of a prefill of {known} random tokens" + copies


@torch.inference_mode()
def prefill_requests(model: Forward, config: ModelConfig, cache: Cache, page_table: Tensor, count: int) -> str:
    """Prefill `count` tokens of each request: states, unlike rows, cannot be made up. Returns what was done, in
    words."""
    for request in range(len(page_table)):
        tokens = random_tokens(config.vocab_size, count, page_table.device, seed=2 + request)
        prefill(model, cache, tokens, page_table[request : request + 1], FILL_CHUNK, request + 1)
    if len(cache.latent) > config.num_hidden_layers:  # the MTP layer's are those of the last layer that has as many
        last = next(i for i in range(config.num_hidden_layers)[::-1] if cache.index_keys[i] is not None)
        for old, new in zip(list_kept(cache, last), list_kept(cache, -1), strict=True):
            new.copy_(old)
    return f"a prefill of {count} random tokens for each request"


def list_kept(cache: Cache, layer: int) -> list[Tensor]:
    """All that is kept of it."""
    held = [*cache.latent[layer], *(cache.index_keys[layer] or ()), *cache.states[layer].values()]
    return [x for x in held if x is not None]


def write_pool(pool: Latents | IndexKeys, slots: Tensor, rows: Tensor) -> None:
    """Rows into a pool of numbers, or into one of FP8 codes with a scale for each row."""
    if isinstance(pool, Latents):
        reference.write_latents(pool, slots, rows)
        return
    if pool.scales is not None:
        rows, row_scales = reference.quantize_rows(rows)
        reference.write_rows(pool.scales, slots, row_scales)
    reference.write_rows(pool.data, slots, rows)
