"""Index logits on tensor cores: the score of every earlier position.

A program holds the queries of a few tokens in shared memory and passes the keys of their request by them. Keys are the
rows of the product and heads its columns, so that the sum over heads stays within a quarter of a warp. Queries are
split into two BF16 numbers: rounding them once already loses 0.14 % of the attention in a layer.

Reference: `index_logits` in reference.py. Serves any number of tokens; keys in BF16, F32, or FP8 with a scale each.
Measured: 3.2 us a token at decode, 9.2 us for 8 tokens. Next: select.py.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.kernels import PAGE
from saccade.kernels.launch import begin, uses_pdl, wait
from saccade.kernels.types import CAPTURED_TOKENS, DECODE_TOKENS, Rotation

DECODE_CHUNK = 128  # keys of a program at decode, or as many times that as leaves about 256 programs
SCORE_PROGRAMS = 256
PREFILL_CHUNK = 2048  # keys of a program in prefill: its queries cost as much to prepare as 2 tiles of keys
PREFILL_TOKENS = 2  # tokens of a program in prefill: 64 KB of split queries
FILL = 1024  # logits of one store of -inf


class ScoreConfig(NamedTuple):
    """How the work is divided; `resolve` fills in what is None."""

    tile: int | None = None  # keys of a product
    chunk: int | None = None  # keys of a program
    tokens: int | None = None  # of a program
    warps: int | None = None
    stages: int | None = None

    def resolve(self, tokens: int, requests: int, context: int, dtype: torch.dtype) -> tuple[int, int, int, int, int]:
        """Its five numbers for a step of `tokens` tokens of `requests` requests; keys in `dtype`."""
        # Of one token a request each, however many: nobody else reads the keys of a request.
        is_few = tokens <= DECODE_TOKENS or tokens == requests <= CAPTURED_TOKENS
        each = self.tokens or (1 if is_few or tokens == requests else PREFILL_TOKENS)
        least = DECODE_CHUNK if dtype == torch.bfloat16 else DECODE_CHUNK // 2
        chunk = least * triton.next_power_of_2(triton.cdiv(triton.cdiv(tokens, each) * context, SCORE_PROGRAMS * least))
        if tokens > DECODE_TOKENS:  # of contexts of many lengths the longest would be waited for
            chunk = min(chunk, PREFILL_CHUNK) if tokens <= CAPTURED_TOKENS else PREFILL_CHUNK
        chunk = self.chunk or chunk
        # 3.2 us a token with 8 warps, 4.0 with 64 keys and 4.
        tile = self.tile or (128 if is_few and least == DECODE_CHUNK and chunk >= 128 else 64)
        warps = self.warps or (8 if tile == 128 and is_few else 4)
        stages = self.stages or (2 if is_few else 3)  # 8 tokens: 9.2 us, not 9.8
        if dtype == torch.float32:
            tile, stages = 32, 1
        return tile, chunk, each, warps, stages


def index_logits(
    q: Tensor,
    weights: Tensor,
    keys: Tensor,
    page_table: Tensor,
    request: Tensor,
    positions: Tensor,
    rotation: Rotation | None = None,
    interleaved: bool = False,
    scale: float = 1.0,
    key_scales: Tensor | None = None,
    fills: bool = True,
    pool: int = 1,
    config: ScoreConfig | None = None,
) -> Tensor:
    """f32 [T, S]: scale * sum over heads of relu(q . k) * weight, -inf at positions after the token's own.

    q: [T, heads, D] with contiguous rows; f32 is taken as two BF16 numbers, BF16 and e4m3 as they are. Given
    `rotation`, q is not rotated yet and its first dimensions are turned here. weights: f32 [T, heads], a view will do.
    keys: the pool [rows, D], BF16, F32, or e4m3 with one of `key_scales` f32 [rows] each. Without `fills` what follows
    a token's own position is left unwritten. pool: tokens that share a key; a key is seen from its last token on.
    """
    t, heads, dim = q.shape
    page = PAGE // pool  # keys of a page
    context = page_table.shape[1] * page
    rope = 2 * rotation.cos.shape[1] if rotation is not None else triton.next_power_of_2(dim) // 2
    assert rope >= 16 and rope == triton.next_power_of_2(rope) and rope <= dim, f"rope of {rope} in {dim} dimensions"
    tile, chunk, tokens, warps, stages = (config or ScoreConfig()).resolve(t, page_table.shape[0], context, keys.dtype)
    assert q.stride(2) == 1 and q.stride(1) == dim and weights.stride(1) == 1 and keys.is_contiguous()
    out = torch.empty(t, triton.cdiv(context, 16) * 16, dtype=torch.float32, device=q.device)  # select reads sixteens
    cos, sin = rotation if rotation is not None else (weights, weights)
    pdl = uses_pdl(q) and (t <= DECODE_TOKENS or t == page_table.shape[0] <= CAPTURED_TOKENS)
    _score[(triton.cdiv(t, tokens), triton.cdiv(context, chunk))](
        q, weights, keys, key_scales, cos, sin, page_table, request, positions, out,
        scale, t, context, out.stride(0), chunk, q.stride(0), weights.stride(0), page_table.stride(0),
        HEADS=heads, COLUMNS=max(triton.next_power_of_2(heads), 16), DIM=dim, ROPE=rope,
        REST=0 if rope == dim else max(triton.next_power_of_2(dim - rope), 16), TOKENS=tokens, TILE=tile, PAGE=page,
        POOL=pool,
        ROTATES=rotation is not None, INTERLEAVED=interleaved, SPLIT=q.dtype == torch.float32,
        EXACT=keys.dtype == torch.float32, SCALED=key_scales is not None, FILLS=fills, FILL=FILL,
        SINGLE=tokens == 1 and chunk == tile, PDL=pdl,
        num_warps=warps, num_stages=stages, launch_pdl=pdl,
    )  # fmt: skip
    return out[:, :context]


@triton.jit(do_not_specialize=["n_tokens", "table_stride"])
def _score(
    q, weights, keys, key_scales, cos, sin, page_table, request, positions, out,
    scale, n_tokens, context, out_stride, chunk, q_stride, weights_stride, table_stride,
    HEADS: tl.constexpr, COLUMNS: tl.constexpr, DIM: tl.constexpr, ROPE: tl.constexpr, REST: tl.constexpr,
    TOKENS: tl.constexpr, TILE: tl.constexpr, PAGE: tl.constexpr, POOL: tl.constexpr, ROTATES: tl.constexpr,
    INTERLEAVED: tl.constexpr, SPLIT: tl.constexpr, EXACT: tl.constexpr, SCALED: tl.constexpr, FILLS: tl.constexpr,
    FILL: tl.constexpr, SINGLE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    begin(PDL)
    first = tl.program_id(0) * TOKENS
    start = tl.program_id(1) * chunk
    stop = tl.minimum(start + chunk, context)
    token = first + tl.arange(0, TOKENS)
    there = token < n_tokens
    if SINGLE:
        # No step changes the rows of earlier steps, so they are asked for before the queries are ready.
        key = start + tl.arange(0, TILE)
        table = page_table + tl.load(request + first) * table_stride
        if TILE <= PAGE:
            row = tl.load(table + start // PAGE) * PAGE + key % PAGE
        else:
            row = tl.load(table + key // PAGE, mask=key < context, other=0) * PAGE + key % PAGE
        k, more = _load_keys(keys, row, DIM, ROPE, REST)
    wait(PDL)
    position = tl.load(positions + token, mask=there, other=-1).to(tl.int32)
    if POOL > 1:
        position = (position + 1) // POOL - 1  # the last key that is seen; -1 for none
    owner = tl.load(request + token, mask=there, other=-1)
    mine = tl.load(request + first)

    if start <= tl.max(position, 0):
        column = tl.arange(0, TOKENS * COLUMNS)
        # Padding repeats the last query, with no weight: loads without a mask are not held back by the compiler.
        q_token, head = tl.minimum(first + column // COLUMNS, n_tokens - 1), column % COLUMNS
        query = q + q_token.to(tl.int64) * q_stride + tl.minimum(head, HEADS - 1) * DIM
        # All loads before the first use of one, or they would wait for each other.
        x, y, z = _load_queries(query, DIM, ROPE, REST, ROTATES, INTERLEAVED)
        if SINGLE and start + TILE > tl.max(position, 0) + 1 - n_tokens:  # rows of this step may be among them
            k, more = _load_keys(keys, row, DIM, ROPE, REST)
        w = tl.load(weights + q_token * weights_stride + head, mask=head < HEADS, other=0.0) * scale
        if ROTATES:
            x = _rotate(x, y, q_token, first, cos, sin, TOKENS, ROPE, INTERLEAVED)
        turned, turned_low = _split(x, SPLIT, EXACT)
        rest, rest_low = _split(z, SPLIT, EXACT)
        if SINGLE:
            logits = _combine(k, more, turned, turned_low, rest, rest_low, w, TILE, TOKENS, COLUMNS, REST, SPLIT, EXACT)
            if SCALED:
                logits *= tl.load(key_scales + row)[:, None]
            visible = key[:, None] <= position[None, :]
            tl.store(out + token[None, :].to(tl.int64) * out_stride + key[:, None], logits, mask=visible)
        else:
            for i in range(TOKENS):  # one pass for each request that has tokens here: nearly always one in all
                if TOKENS == 1:
                    end = tl.minimum(stop, tl.max(position, 0) + 1)
                else:
                    mine = tl.load(request + tl.minimum(first + i, n_tokens - 1))
                    before = tl.load(request + tl.minimum(first + tl.maximum(i - 1, 0), n_tokens - 1))
                    seen = tl.max(tl.where(owner == mine, position, -1), 0)
                    end = tl.where((i == 0) | (before != mine), tl.minimum(stop, seen + 1), start)
                for tile in range(start, end, TILE):
                    key = tile + tl.arange(0, TILE)
                    if TILE <= PAGE:
                        row = tl.load(page_table + mine * table_stride + tile // PAGE) * PAGE + key % PAGE
                    else:
                        pages = tl.load(page_table + mine * table_stride + key // PAGE, mask=key < context, other=0)
                        row = pages * PAGE + key % PAGE
                    k, more = _load_keys(keys, row, DIM, ROPE, REST)
                    logits = _combine(
                        k, more, turned, turned_low, rest, rest_low, w, TILE, TOKENS, COLUMNS, REST, SPLIT, EXACT
                    )
                    if SCALED:
                        logits *= tl.load(key_scales + row)[:, None]
                    visible = (key[:, None] <= position[None, :]) & (key[:, None] < stop) & (owner == mine)[None, :]
                    tl.store(out + token[None, :].to(tl.int64) * out_stride + key[:, None], logits, mask=visible)

    if FILLS:
        shortest = tl.min(tl.where(there, position, context), 0)
        for tile in range(tl.maximum(start, (shortest + 1) // FILL * FILL), stop, FILL):
            later = tile + tl.arange(0, FILL)
            hidden = (later[None, :] > position[:, None]) & (later[None, :] >= start) & (later[None, :] < stop)
            place = out + token[:, None].to(tl.int64) * out_stride + later[None, :]
            tl.store(place, tl.full([TOKENS, FILL], float("-inf"), tl.float32), mask=hidden & there[:, None])


@triton.jit
def _load_queries(
    start, DIM: tl.constexpr, ROPE: tl.constexpr, REST: tl.constexpr, ROTATES: tl.constexpr, INTERLEAVED: tl.constexpr
):
    """Dimensions of some queries: the first ROPE, whole or (to be turned as halves) in two, and the others."""
    HALF: tl.constexpr = ROPE // 2
    if ROTATES and not INTERLEAVED:
        x = tl.load(start[:, None] + tl.arange(0, HALF)[None, :])
        y = tl.load(start[:, None] + HALF + tl.arange(0, HALF)[None, :])
    else:
        x = tl.load(start[:, None] + tl.arange(0, ROPE)[None, :])
        y = x
    if REST > 0:
        column = ROPE + tl.arange(0, REST)
        if ROPE + REST == DIM:
            z = tl.load(start[:, None] + column[None, :])
        else:
            z = tl.load(start[:, None] + column[None, :], mask=(column < DIM)[None, :], other=0.0)
    else:
        z = x
    return x, y, z


@triton.jit
def _rotate(x, y, token, first, cos, sin, TOKENS: tl.constexpr, ROPE: tl.constexpr, INTERLEAVED: tl.constexpr):
    """x, turned: [columns, ROPE]. Its halves are x and y, or its pairs are neighbours in x."""
    HALF: tl.constexpr = ROPE // 2
    pair = tl.arange(0, HALF)
    if TOKENS == 1:
        c = tl.load(cos + first * HALF + pair)[None, :]
        s = tl.load(sin + first * HALF + pair)[None, :]
    else:
        c = tl.load(cos + token[:, None] * HALF + pair[None, :])
        s = tl.load(sin + token[:, None] * HALF + pair[None, :])
    if INTERLEAVED:
        a, b = tl.split(tl.reshape(x, [x.shape[0], HALF, 2]))
        turned = tl.reshape(tl.join(a * c - b * s, b * c + a * s), [x.shape[0], ROPE])
    else:
        both = tl.join(x * c - y * s, y * c + x * s)  # [columns, HALF, 2]
        turned = tl.reshape(tl.permute(both, [0, 2, 1]), [x.shape[0], ROPE])
    return turned


@triton.jit
def _split(x, SPLIT: tl.constexpr, EXACT: tl.constexpr):
    """x as the sum of two BF16 numbers; or x itself."""
    if EXACT:
        high, low = x.to(tl.float32), x.to(tl.float32)
    elif SPLIT:
        high = x.to(tl.bfloat16)
        low = (x - high.to(tl.float32)).to(tl.bfloat16)
    else:
        high, low = x.to(tl.bfloat16), x.to(tl.bfloat16)
    return high, low


@triton.jit
def _load_keys(keys, row, DIM: tl.constexpr, ROPE: tl.constexpr, REST: tl.constexpr):
    """Some keys in two parts, as the queries are: [rows, ROPE], [rows, REST]."""
    place, column = keys + row[:, None] * DIM, ROPE + tl.arange(0, REST if REST > 0 else ROPE)
    k = tl.load(place + tl.arange(0, ROPE)[None, :])
    if REST == 0:
        more = k
    elif ROPE + REST == DIM:
        more = tl.load(place + column[None, :])
    else:
        more = tl.load(place + column[None, :], mask=(column < DIM)[None, :], other=0.0)
    return k, more


@triton.jit
def _combine(
    k, more, turned, turned_low, rest, rest_low, w, TILE: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
    REST: tl.constexpr, SPLIT: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """The scores of some keys with the queries of TOKENS tokens, over all heads: [TILE, TOKENS]."""
    scores = _multiply(k, turned, turned_low, tl.zeros([TILE, TOKENS * COLUMNS], tl.float32), SPLIT, EXACT)
    if REST > 0:
        scores = _multiply(more, rest, rest_low, scores, SPLIT, EXACT)
    seen = tl.maximum(scores, 0.0, propagate_nan=tl.PropagateNan.ALL)  # else a NaN would be a score of 0
    return tl.sum(tl.reshape(seen * w[None, :], [TILE, TOKENS, COLUMNS]), 2)


@triton.jit
def _multiply(k, q, q_low, sum, SPLIT: tl.constexpr, EXACT: tl.constexpr):
    """sum + k . q: [rows, columns]."""
    if EXACT:
        sum = tl.dot(k, tl.trans(q), sum, input_precision="tf32x3")
    else:
        sum = tl.dot(k.to(tl.bfloat16), tl.trans(q), sum)
        if SPLIT:
            sum = tl.dot(k.to(tl.bfloat16), tl.trans(q_low), sum)
    return sum
