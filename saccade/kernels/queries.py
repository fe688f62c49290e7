"""The second launch of attention: queries from their low rank, and the token's rows of the cache beside them.

Both need what the first launch gave and not each other: two programs write a latent and an index key while hundreds
multiply. A launch of its own cost the two 3.6 us at batch 1. Next: rows.py, entries.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.kernels.entries import Entry, write_entry
from saccade.kernels.launch import begin, uses_pdl
from saccade.kernels.rows import INSIDE, NARROW, Norm, Part, as_operand, count_rows, cut, run_rows


@triton.jit
def _project_queries(
    low, gain, out, w0, s0, w1, s1, rows0, rows1, K, low_stride, eps,
    key, key_stride, kv_gain, kv_eps, weight, bias, k_eps, cos, sin, slots, latent, keys, scales,
    PROGRAMS0: tl.constexpr, PROGRAMS1: tl.constexpr, BN0: tl.constexpr, BN1: tl.constexpr, STRIP: tl.constexpr,
    STRIPS: tl.constexpr, HELD: tl.constexpr, CODED0: tl.constexpr, CODED1: tl.constexpr, EVEN: tl.constexpr,
    LORA: tl.constexpr, LORA_UP: tl.constexpr, ROPE: tl.constexpr, DIM: tl.constexpr, DIM_UP: tl.constexpr,
    INTERLEAVED: tl.constexpr, HAS_KEYS: tl.constexpr, QUANTISED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    begin(PDL)
    program, token = tl.program_id(0), tl.program_id(1)
    WRITERS: tl.constexpr = 2 if HAS_KEYS else 1
    if program < WRITERS:
        write_entry(low, low_stride, key, key_stride, kv_gain, kv_eps, weight, bias, k_eps, cos, sin, slots, latent,
                    keys, scales, token, program, K, LORA, LORA_UP, ROPE, DIM, DIM_UP, INTERLEAVED, HAS_KEYS,
                    QUANTISED, PDL)  # fmt: skip
    elif program < WRITERS + PROGRAMS0:
        run_rows(low + token * low_stride, gain, eps, out, out + token * (rows0 + rows1), w0, s0, rows0, K,
                 (program - WRITERS) * BN0, 0, out, out, out, BN0, STRIP, STRIPS, HELD, CODED0, INSIDE, 1, 1, False,
                 False, EVEN, PDL)  # fmt: skip
    else:
        run_rows(low + token * low_stride, gain, eps, out, out + token * (rows0 + rows1), w1, s1, rows1, K,
                 (program - WRITERS - PROGRAMS0) * BN1, rows0, out, out, out, BN1, STRIP, STRIPS, HELD, CODED1, INSIDE,
                 1, 1, False, False, EVEN, PDL)  # fmt: skip


def project_queries(
    low: Tensor,
    norm: Norm,
    parts: list[Part],
    entry: Entry,
    tile_bytes: int = 12288,
    widest: int = NARROW,
) -> Tensor:
    """f32 [T, rows of the one or two parts] = norm(low[:, :k]) @ part.T; writes `entry` of `low` f32 [T, k + latent +
    rope] into the cache. Meant for T = 1, like rows.multiply."""
    operands = [as_operand(part) for part in parts]
    k = norm.weight.shape[0]
    how = cut(k, widest)
    rows = [o.data.shape[0] for o in operands]
    tiles = [count_rows(o, how, tile_bytes) for o in operands]
    programs = [-(-n // tile) for n, tile in zip(rows, tiles, strict=True)]
    if len(operands) == 1:
        operands, rows, tiles, programs = operands * 2, [*rows, 0], tiles * 2, [*programs, 0]
    uses = uses_pdl(low)
    out = torch.empty(low.shape[0], sum(rows), dtype=torch.float32, device=low.device)
    tensors, sizes = entry.arguments(low)
    _project_queries[1 + sizes["HAS_KEYS"] + sum(programs), low.shape[0]](
        low, norm.weight, out, *[t for o in operands for t in (o.data, o.scale)], *rows, k, low.stride(0), norm.eps,
        *tensors, PROGRAMS0=programs[0], PROGRAMS1=programs[1], BN0=tiles[0],
        BN1=tiles[1], STRIP=how.width, STRIPS=how.strips, HELD=how.held, CODED0=operands[0].is_coded,
        CODED1=operands[1].is_coded, EVEN=how.is_even, **sizes, PDL=uses,
        num_warps=how.warps, launch_pdl=uses,
    )  # fmt: skip
    return out
