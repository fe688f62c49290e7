"""Queries from their low rank, and beside them the tokens' rows of the cache.

Both need what the launch before gave, and neither needs the other. For one or two tokens, two programs write a latent
row and an index key while hundreds multiply: a launch of their own took 3.6 us longer. For more tokens, the launch that
prepares the product's input writes them.

Reference: `make_queries` in ops/reference.py. Serves any number of tokens. Next: linear/gemv.py, linear/split_k.py,
cache_rows.py.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.kernels.activations import Activations, Beside, Formats, prepare_activations, write_split_rows
from saccade.kernels.attention.cache_rows import Placed, write_cache_row
from saccade.kernels.launch import begin, uses_pdl
from saccade.kernels.linear.gemv import GemvConfig, divide_rows, run_rows
from saccade.kernels.linear.row_chunks import as_stored
from saccade.kernels.linear.split_k import split_k
from saccade.kernels.residual import INSIDE
from saccade.kernels.types import GEMV_TOKENS, Matrix, Norm


@triton.jit(do_not_specialize=["rows", "room", "counted"])
def _write_beside(
    low, weight, eps, fp32, fp16, unit, bf16, rounded, fp8, fp8_scale, counters, stride, rows, room, counted,
    key, key_stride, kv_gain, kv_eps, key_weight, key_bias, k_eps, cos, sin, slots, latent, latent_rope,
    latent_scales, keys, scales, gate, place_bias, ring, request, positions, starts, ends, places,
    LORA: tl.constexpr, LORA_UP: tl.constexpr, ROPE: tl.constexpr, DIM: tl.constexpr, DIM_UP: tl.constexpr,
    INTERLEAVED: tl.constexpr, HAS_KEYS: tl.constexpr, QUANTISED: tl.constexpr, CODED: tl.constexpr,
    POOL: tl.constexpr, RING: tl.constexpr, K: tl.constexpr, NORM: tl.constexpr, GATED: tl.constexpr,
    LIMIT: tl.constexpr, FP32: tl.constexpr, FP16: tl.constexpr, BF16: tl.constexpr, BF16_LOW: tl.constexpr,
    ROUNDED: tl.constexpr, FP8: tl.constexpr, ROWS_OF_COUNTERS: tl.constexpr, APART: tl.constexpr,
    PERMUTED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`write_splits` of activations.py, behind the programs that write the tokens' cache rows."""
    begin(PDL)
    WRITERS: tl.constexpr = 2 if HAS_KEYS else 1
    program = tl.program_id(0)
    if program < rows * WRITERS:
        write_cache_row(low, stride, key, key_stride, kv_gain, kv_eps, key_weight, key_bias, k_eps, cos, sin, slots,
                        latent, latent_rope, latent_scales, keys, scales, gate, place_bias, ring, request, positions,
                        starts, ends, places, program // WRITERS, program % WRITERS, K, LORA, LORA_UP, ROPE, DIM,
                        DIM_UP, INTERLEAVED, HAS_KEYS, QUANTISED, CODED, POOL, RING, PDL)  # fmt: skip
    else:
        write_split_rows(program - rows * WRITERS, low, weight, eps, fp32, fp16, unit, bf16, rounded, fp8, fp8_scale,
                         counters, stride, rows, room, counted, K, NORM, GATED, LIMIT, FP32, FP16, BF16, BF16_LOW,
                         ROUNDED, FP8, ROWS_OF_COUNTERS, APART, PERMUTED, ROWS, BLOCK, PDL)  # fmt: skip


@triton.jit
def _project_queries(
    low, gain, out, w0, s0, w1, s1, rows0, rows1, K, low_stride, eps,
    key, key_stride, kv_gain, kv_eps, weight, bias, k_eps, cos, sin, slots, latent, latent_rope,
    latent_scales, keys, scales, gate, place_bias, ring, request, positions, starts, ends, places,
    PROGRAMS0: tl.constexpr, PROGRAMS1: tl.constexpr, BN0: tl.constexpr, BN1: tl.constexpr, CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr, HELD: tl.constexpr, CODED0: tl.constexpr, CODED1: tl.constexpr, EVEN: tl.constexpr,
    LORA: tl.constexpr, LORA_UP: tl.constexpr, ROPE: tl.constexpr, DIM: tl.constexpr, DIM_UP: tl.constexpr,
    INTERLEAVED: tl.constexpr, HAS_KEYS: tl.constexpr, QUANTISED: tl.constexpr, CODED: tl.constexpr,
    POOL: tl.constexpr, RING: tl.constexpr, TOKENS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    begin(PDL)
    program, token = tl.program_id(0) // TOKENS, tl.program_id(0) % TOKENS
    WRITERS: tl.constexpr = 2 if HAS_KEYS else 1
    if program < WRITERS:
        write_cache_row(low, low_stride, key, key_stride, kv_gain, kv_eps, weight, bias, k_eps, cos, sin, slots, latent,
                        latent_rope, latent_scales, keys, scales, gate, place_bias, ring, request, positions, starts,
                        ends, places, token, program, K, LORA, LORA_UP, ROPE, DIM, DIM_UP, INTERLEAVED, HAS_KEYS,
                        QUANTISED, CODED, POOL, RING, PDL)  # fmt: skip
    elif program < WRITERS + PROGRAMS0:
        run_rows(low + token * low_stride, gain, eps, out, out + token * (rows0 + rows1), w0, s0, rows0, K,
                 (program - WRITERS) * BN0, 0, out, out, out, BN0, CHUNK, CHUNKS, HELD, CODED0, INSIDE, 1, 1, False,
                 False, EVEN, PDL)  # fmt: skip
    else:
        run_rows(low + token * low_stride, gain, eps, out, out + token * (rows0 + rows1), w1, s1, rows1, K,
                 (program - WRITERS - PROGRAMS0) * BN1, rows0, out, out, out, BN1, CHUNK, CHUNKS, HELD, CODED1, INSIDE,
                 1, 1, False, False, EVEN, PDL)  # fmt: skip


# As many bytes as make one wave of programs. With half of them, a fifth of the programs begins when the others have
# ended: a layer takes 69.0 us instead of 67.6.
QUERIES = GemvConfig(24576, 512, 24576)


def project_few(
    low: Tensor, norm: Norm, parts: list[Matrix], placed: Placed, config: GemvConfig | None = None
) -> Tensor:
    """`project_queries` for up to GEMV_TOKENS tokens."""
    k = norm.weight.shape[0]
    shared = divide_rows([as_stored(part) for part in parts], k, config or QUERIES).fill_up(2)
    how, coded = shared.chunking, [m.is_coded for m in shared.matrices]
    uses = uses_pdl(low)
    out = torch.empty(low.shape[0], sum(shared.rows), dtype=torch.float32, device=low.device)
    tensors, sizes = placed.arguments(low)
    _project_queries[len(low) * (1 + sizes["HAS_KEYS"] + sum(shared.programs)),](
        low, norm.weight, out, *shared.tensors(), *shared.rows, k, low.stride(0), norm.eps, *tensors,
        PROGRAMS0=shared.programs[0], PROGRAMS1=shared.programs[1], BN0=shared.tiles[0], BN1=shared.tiles[1],
        CHUNK=how.width, CHUNKS=how.chunks, HELD=how.held, CODED0=coded[0], CODED1=coded[1], EVEN=how.is_even, **sizes,
        TOKENS=len(low), PDL=uses, num_warps=how.warps, launch_pdl=uses,
    )  # fmt: skip
    return out


def beside_rows(low: Tensor, placed: Placed) -> Beside:
    """The programs that write the `placed` rows of `low`, for a launch of `write_activations` on low[:, :k]."""
    tensors, sizes = placed.arguments(low)
    return Beside(_write_beside, len(low) * (1 + sizes["HAS_KEYS"]), tensors, sizes)


def prepare_queries(low: Tensor, norm: Norm, formats: Sequence[Formats], placed: Placed) -> Activations:
    """norm(low[:, :k]) in all `formats`, for any number of tokens.

    It also writes the `placed` rows of `low` f32 [T, k + latent + rope] into the cache.
    """
    taken = low[:, : norm.weight.shape[0]]
    return prepare_activations(taken, *formats, norm=norm, beside=beside_rows(low, placed))


def project_queries(low: Tensor, norm: Norm, parts: list[Matrix], placed: Placed) -> Tensor:
    """f32 [T, rows of the one or two parts] = norm(low[:, :k]) @ part.T for up to SPLIT_TOKENS tokens.

    It also writes the `placed` rows of `low` f32 [T, k + latent + rope] into the cache.
    """
    if len(low) <= GEMV_TOKENS:
        return project_few(low, norm, parts, placed)
    return split_k(low[:, : norm.weight.shape[0]], parts, norm, beside=beside_rows(low, placed))
