"""Kimi delta attention of prompts: chunks of 64 tokens, whose products run on tensor cores (Kimi Linear report).

A chunk that begins with the matrix S has, with the terms of terms.py,

    U   = T V - T (K * exp G) S: what each token adds;   S' = exp(G_64) S + (K * exp(G_64 - G))^T U
    out = (Q * exp G) S + B U

Four launches: two for the terms of all chunks; then a program takes 32 columns of a head's matrix from chunk to chunk;
then norm and output gate of all rows. The matrix is in fp32, products take two BF16 numbers of each factor: the result
differs from one in fp64 by 1e-5. Requests whose tokens may be taken back are left to tokens.py, which must run before:
it applies what is pending.

Reference: `run_delta` in delta.py. A rank of 8 of GLM-5.3-Flash has to read and write 0.2 GB for 8,192 tokens of a
layer, 42 us at 4.8 TB/s; the terms take another 0.5 GB, which lie in 0.23 GB. Not measured alone yet. Next:
recur.py.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from saccade.kernels.activations import split_in_two
from saccade.kernels.launch import begin, uses_pdl, wait
from saccade.kernels.recurrent.delta import DeltaState, DeltaWeights
from saccade.kernels.recurrent.gates import Gates
from saccade.kernels.recurrent.terms import CHUNK, LEAST_BOUND, TermsConfig, count_chunks, dot_pairs, make_terms
from saccade.kernels.recurrent.tokens import Where, find_unit, normalize_head, write_inputs
from saccade.kernels.types import Norm


class ChunksConfig(NamedTuple):
    """How the work is divided. Not measured yet."""

    columns: int = 32  # of a matrix, of a program that goes from chunk to chunk
    warps: int = 4


@triton.jit
def _load_pair(at, apart):
    return tl.load(at), tl.load(at + apart)


@triton.jit
def _scan_chunks(
    qkv, decays, betas, places, positions, query_start, matrix, base, recent, sums, queries, ends, answers, solved,
    values, out, stride, HEADS: tl.constexpr, DIM: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    BR: tl.constexpr, WIDTH: tl.constexpr, RING: tl.constexpr, SPLITS: tl.constexpr, UNIT: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """A program takes BV columns of a head of a request through all of its chunks."""
    begin(PDL)
    wait(PDL)
    stride *= UNIT
    N: tl.constexpr = HEADS * DIM
    ROW: tl.constexpr = 4 * N + HEADS
    MOST: tl.constexpr = RING - WIDTH + 1
    program = tl.program_id(0)
    split, head, request = program % SPLITS, program // SPLITS % HEADS, program // SPLITS // HEADS
    first = tl.load(query_start + request)
    count = (tl.load(query_start + request + 1) - first).to(tl.int32)
    place = tl.load(places + request)
    if (count > MOST) & (place > 0):
        before = tl.sum(count_chunks(query_start, request, MOST, BR), 0)
        start = tl.load(positions + first).to(tl.int32)
        row, key, value = tl.arange(0, CHUNK), tl.arange(0, BK), split * BV + tl.arange(0, BV)
        step = tl.arange(0, CHUNK)
        cells = matrix + (place * HEADS + head) * DIM * DIM + key[:, None] * DIM + value[None, :]
        inside = (key < DIM)[:, None] & (value < DIM)[None, :]
        held = tl.load(cells, mask=inside, other=0.0)  # [dim, BV]
        wide = row[:, None] * BK + key[None, :]
        for i in range(tl.cdiv(count, CHUNK)):
            chunk = (before + i) * HEADS + head
            base_cell = chunk * CHUNK * BK
            zeros = tl.zeros([CHUNK, BV], tl.float32)
            s_high, s_low = split_in_two(held, tl.bfloat16)
            added = tl.load(values + base_cell + row[:, None] * BK + value[None, :])  # [64, BV]
            w_high, w_low = _load_pair(solved + 2 * base_cell + wide, CHUNK * BK)
            added -= dot_pairs(w_high, w_low, s_high, s_low, zeros)
            u_high, u_low = split_in_two(added, tl.bfloat16)
            k_high, k_low = _load_pair(ends + 2 * base_cell + wide, CHUNK * BK)
            decay = tl.exp(tl.load(sums + base_cell + (CHUNK - 1) * BK + key))
            held = dot_pairs(tl.trans(k_high), tl.trans(k_low), u_high, u_low, held * decay[:, None])
            q_high, q_low = _load_pair(queries + 2 * base_cell + wide, CHUNK * BK)
            answer = dot_pairs(q_high, q_low, s_high, s_low, zeros)
            square = answers + 2 * chunk * CHUNK * CHUNK + row[:, None] * CHUNK + step[None, :]
            b_high, b_low = _load_pair(square, CHUNK * CHUNK)
            answer = dot_pairs(b_high, b_low, u_high, u_low, answer)
            at = i * CHUNK + row
            line = (first + at)[:, None] * N + head * DIM + value[None, :]
            tl.store(out + line, answer, mask=(at < count)[:, None] & (value < DIM)[None, :])
        tl.store(cells, held, mask=inside)
        write_inputs(qkv, stride, decays, betas, first, recent + place * RING * ROW, base, start, count, head, value,
                     value < DIM, split == 0, RING, HEADS, DIM)  # fmt: skip
        if split == 0:
            tl.store(base + place * HEADS + head, (start + count).to(tl.float32))


@triton.jit
def _normalize_heads(
    out, outputs, gain, eps, HEADS: tl.constexpr, DIM: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    begin(PDL)
    wait(PDL)
    column, at = tl.arange(0, BK), tl.program_id(0).to(tl.int64) * DIM
    normalize_head(out, outputs, gain, eps, at, column, column < DIM, DIM)


def can_be_chunked(delta: DeltaWeights) -> bool:
    """Whether decays within a block stay in the range of fp32."""
    return delta.lower_bound >= LEAST_BOUND


def run_chunks(
    qkv: Tensor, gates: Gates, delta: DeltaWeights, norm: Norm, state: DeltaState, where: Where,
    config: ChunksConfig | None = None, terms_config: TermsConfig | None = None,
) -> None:  # fmt: skip
    """Requests of more tokens than may be taken back, then the norm and gate of every row of `gates.out`."""
    tokens, requests, heads, dim = len(qkv), len(where.places), delta.heads, delta.dim
    how, pdl, unit = config or ChunksConfig(), uses_pdl(qkv), find_unit(qkv)
    width, ring = delta.conv.shape[1], state.recent.shape[1]
    block = max(16, triton.next_power_of_2(dim))
    long = min(requests, max(1, tokens // (ring - width + 2)))  # at most so many requests have chunks
    shape: dict[str, Any] = {
        "HEADS": heads, "DIM": dim, "BK": block, "BR": max(16, triton.next_power_of_2(requests)), "WIDTH": width,
        "RING": ring, "UNIT": unit, "PDL": pdl, "launch_pdl": pdl,
    }  # fmt: skip
    chunks = tokens // CHUNK.value + long
    terms = make_terms(qkv, gates, delta, state.recent, where, chunks, shape, terms_config)
    splits = triton.cdiv(dim, how.columns)
    _scan_chunks[requests * heads * splits,](
        qkv, gates.decays, gates.betas, *where, state.matrix, state.base, state.recent, terms.sums, terms.queries,
        terms.ends, terms.answers, terms.solved, terms.values, gates.out, qkv.stride(0) // unit, BV=how.columns,
        SPLITS=splits, **shape, num_warps=how.warps, num_stages=1,
    )  # fmt: skip
    _normalize_heads[tokens * heads,](
        gates.out, gates.outputs, norm.weight, norm.eps, HEADS=heads, DIM=dim, BK=block, PDL=pdl, num_warps=1,
        launch_pdl=pdl,
    )  # fmt: skip
