"""What a token leaves in the cache: its latent row and its index key.

The latent is normalised and its rotary part rotated. The index key goes through a LayerNorm with bias, and its first
dimensions are rotated; or several become one (indexer/pool_rows.py). All is fp32 until it is stored.

Reference: `make_queries` in ops/reference.py, `quantize_rows` in reference.py. Serves any number of tokens; pools in
BF16 or F32, latents and index keys also in FP8. Next: queries.py, which launches it.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from saccade.kernels.attention.latents import find_row, pass_latents
from saccade.kernels.indexer.pool_rows import Requests, find_row_scale, write_pooled_key
from saccade.kernels.launch import wait
from saccade.kernels.residual import find_factor
from saccade.kernels.types import CacheRows, IndexKeys, KeyNorm, Rotation


@triton.jit
def _turn(a, b, cos, sin):
    return a * cos - b * sin, b * cos + a * sin


@triton.jit
def _write_latent(
    low, gain, eps, cos, sin, row, turned, row_scale, Q_LORA, LORA: tl.constexpr, LORA_UP: tl.constexpr,
    ROPE: tl.constexpr, CODED: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, LORA_UP)
    a = tl.load(low + Q_LORA + column, mask=column < LORA, other=0.0)
    a = a * find_factor(a * a, LORA, eps) * tl.load(gain + column, mask=column < LORA, other=0.0)
    if CODED:
        scale = find_row_scale(tl.max(tl.abs(a), 0), tl.sum(a * 0.0, 0))
        tl.store(row_scale, scale)
        a = a / scale
    tl.store(row + column, a.to(row.dtype.element_ty), mask=column < LORA)
    if ROPE > 0:
        pair = tl.arange(0, ROPE // 2)
        first = tl.load(low + Q_LORA + LORA + 2 * pair)
        second = tl.load(low + Q_LORA + LORA + 2 * pair + 1)
        first, second = _turn(first, second, tl.load(cos + pair), tl.load(sin + pair))
        tl.store(turned + 2 * pair, first.to(turned.dtype.element_ty))
        tl.store(turned + 2 * pair + 1, second.to(turned.dtype.element_ty))


@triton.jit
def _write_key(
    keyed, weight, bias, eps, cos, sin, row, row_scale, DIM: tl.constexpr, DIM_UP: tl.constexpr, ROPE: tl.constexpr,
    INTERLEAVED: tl.constexpr, QUANTISED: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, DIM_UP)
    inside = column < DIM
    a = tl.load(keyed + column, mask=inside, other=0.0)
    mean = tl.sum(a, 0) / DIM
    off = tl.where(inside, a - mean, 0.0)
    factor = find_factor(off * off, DIM, eps)
    y = off * factor * tl.load(weight + column, mask=inside, other=0.0) + tl.load(bias + column, mask=inside, other=0.0)
    pair = tl.arange(0, ROPE // 2)
    place = 2 * pair if INTERLEAVED else pair
    other = place + 1 if INTERLEAVED else pair + ROPE // 2
    first = (tl.load(keyed + place) - mean) * factor * tl.load(weight + place) + tl.load(bias + place)
    second = (tl.load(keyed + other) - mean) * factor * tl.load(weight + other) + tl.load(bias + other)
    first, second = _turn(first, second, tl.load(cos + pair), tl.load(sin + pair))
    is_rest = inside & (column >= ROPE)
    if QUANTISED:
        largest = tl.max(tl.where(is_rest, tl.abs(y), 0.0), 0)
        largest = tl.maximum(largest, tl.max(tl.maximum(tl.abs(first), tl.abs(second)), 0))
        nothing = tl.sum(tl.where(is_rest, y * 0.0, 0.0), 0) + tl.sum(first * 0.0 + second * 0.0, 0)
        scale = find_row_scale(largest, nothing)
        tl.store(row_scale, scale)
        y, first, second = y / scale, first / scale, second / scale
    tl.store(row + column, y.to(row.dtype.element_ty), mask=is_rest)
    tl.store(row + place, first.to(row.dtype.element_ty))
    tl.store(row + other, second.to(row.dtype.element_ty))


@triton.jit
def write_cache_row(
    low, low_stride, key, key_stride, kv_gain, kv_eps, weight, bias, k_eps, cos, sin, slots, latent, latent_rope,
    latent_scales, keys, scales, gate, place_bias, ring, request, positions, starts, ends, places, token, part, Q_LORA,
    LORA: tl.constexpr, LORA_UP: tl.constexpr, ROPE: tl.constexpr, DIM: tl.constexpr, DIM_UP: tl.constexpr,
    INTERLEAVED: tl.constexpr, HAS_KEYS: tl.constexpr, QUANTISED: tl.constexpr, CODED: tl.constexpr,
    POOL: tl.constexpr, RING: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Part 0 of a token's rows is its latent row, part 1 its index key."""
    wait(PDL)
    token = token.to(tl.int64)
    slot = tl.maximum(tl.load(slots + token), 0)  # padding goes to page 0, which is nobody's
    cos += token * (ROPE // 2)
    sin += token * (ROPE // 2)
    if part == 0:
        row, turned = find_row(latent, latent_rope, slot, LORA, ROPE, CODED)
        _write_latent(low + token * low_stride, kv_gain, kv_eps, cos, sin, row, turned, latent_scales + slot,
                      Q_LORA, LORA, LORA_UP, ROPE, CODED)  # fmt: skip
    else:
        if POOL > 1:
            write_pooled_key(key, gate, key_stride, weight, bias, k_eps, place_bias, ring, request, positions, starts,
                             ends, places, slots, keys, scales, token, DIM, DIM_UP, POOL, RING, QUANTISED)  # fmt: skip
        elif HAS_KEYS:
            _write_key(key + token * key_stride, weight, bias, k_eps, cos, sin, keys + slot * DIM, scales + slot,
                       DIM, DIM_UP, ROPE, INTERLEAVED, QUANTISED)  # fmt: skip


class Placed(NamedTuple):
    """Cache rows of a step, with what its tokens have in common."""

    rows: CacheRows
    rotation: Rotation
    slots: Tensor  # i64 [T]; -1 for padding
    requests: Requests | None = None  # of pooled keys

    def arguments(self, low: Tensor) -> tuple[list[Tensor | int | float], dict[str, int | bool]]:
        """Those of the kernels, after `low` and its stride; and their constants."""
        r = self.rows
        lora, rope = r.kv_norm.weight.shape[0], 2 * self.rotation.cos.shape[1]
        assert r.latent.scales is None or r.latent.data.shape[1] == lora, (
            "codes of rotated keys: cache_rows names no rope"
        )
        has_keys = r.key is not None and r.key_norm is not None and r.keys is not None
        unused = KeyNorm(r.kv_norm.weight, r.kv_norm.weight, 0.0, False)
        norm = r.key_norm if has_keys and r.key_norm is not None else unused
        dim = norm.weight.shape[0] if has_keys else 1
        key = r.key if has_keys and r.key is not None else low
        keys = r.keys if has_keys and r.keys is not None else IndexKeys(low)
        tensors: list[Tensor | int | float] = [
            key, key.stride(0), r.kv_norm.weight, r.kv_norm.eps, norm.weight, norm.bias, norm.eps, self.rotation.cos,
            self.rotation.sin, self.slots, *pass_latents(r.latent), keys.data,
            low if keys.scales is None else keys.scales,
        ]  # fmt: skip
        pool, pools = 1, [self.slots] * 8
        if r.pooling is not None and self.requests is not None:
            pool, gate, ring = r.pooling.size, r.pooling.gate, r.pooling.recent
            assert rope == 0 and pool & (pool - 1) == 0 and gate.stride() == key.stride(), f"pools of {pool}"
            pools = [gate, r.pooling.bias, ring, *self.requests]
        tensors += pools
        return tensors, {
            "LORA": lora, "LORA_UP": triton.next_power_of_2(lora), "ROPE": rope, "DIM": dim,
            "DIM_UP": triton.next_power_of_2(dim), "INTERLEAVED": norm.is_interleaved, "HAS_KEYS": has_keys,
            "QUANTISED": keys.scales is not None, "CODED": r.latent.scales is not None, "POOL": pool,
            "RING": pools[2].shape[1] if pool > 1 else 1,
        }  # fmt: skip
