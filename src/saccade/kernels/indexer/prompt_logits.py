"""Index logits of prompts whose queries are rounded: one product for each key and head, in BF16 or FP8.

A program holds the queries of four tokens of 64 heads in shared memory and passes the keys of their request by them, a
page at a time. Keys are the rows of the product and heads its columns, 64 x 256: so the sum over heads stays within a
quarter of a warp, and a key is read from L2 once for four tokens. (For two it would be 4.3 GB for a prompt of 8,192, as
much time as the product.) Two programs share a multiprocessor: one multiplies while the other adds.

By count, 8,192 tokens of 64 heads of 128: the product is 0.55 TFLOP, 0.56 ms in BF16 and 0.28 in FP8 at the data
sheet's rates. The sum needs two instructions a score, maximum and multiply-add: 0.15 ms. (Compiled by Triton 3.9 they
are 2.6, and a step has 461 instructions in all, beside a product that takes tensor cores 980 cycles in BF16 and 490 in
FP8.) In "exact" two products of BF16 numbers take 1.1 ms at best; logits.py computes them.

Tensor cores add products of FP8 codes in some 14 bits. Reference: `index_logits` in reference.py. Serves heads and
dimensions of `can_score_prompts`; keys in BF16, or FP8 with a scale each. Next: scores_hopper.py, the
same for a Hopper, which is taken where `config` is None; select.py.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.kernels import PAGE
from saccade.kernels.activations import dot
from saccade.kernels.indexer.queries import IndexQueries
from saccade.kernels.indexer.scores_hopper import are_scored_by_hand, score_by_hand
from saccade.kernels.launch import tiled
from saccade.kernels.types import IndexKeys

SCORE_COLUMNS = 256  # tokens times heads: the widest wgmma


class PromptScoreConfig(NamedTuple):
    """How the work is divided."""

    columns: int = SCORE_COLUMNS
    chunk: int = 2048  # keys of a program
    warps: int = 4
    stages: int = 2


# Of the last 4,096 of 8,192 tokens, on an H200: 0.76 ms (256 columns: 0.79) and 0.53 ms (2 stages: 0.58).
BF16_SCORES, FP8_SCORES = PromptScoreConfig(columns=128), PromptScoreConfig(stages=3)


def can_score_prompts(heads: int, dim: int, pool: int, keys: IndexKeys) -> bool:
    """Whether the kernel takes these shapes; `pool`: tokens that share a key."""
    is_even = all(n & (n - 1) == 0 for n in (heads, dim))
    return pool == 1 and is_even and 16 <= heads <= SCORE_COLUMNS and dim >= 32 and keys.data.dtype != torch.float32


def score_prompt(
    q: IndexQueries, keys: IndexKeys, page_table: Tensor, request: Tensor, positions: Tensor,
    config: PromptScoreConfig | None = None,
) -> Tensor:  # fmt: skip
    """f32 [T, S]: sum over heads of relu(q . k) * weight for positions up to a token's own; what follows is not
    written."""
    (t, heads, dim), is_fp8 = q.numbers.shape, q.numbers.element_size() == 1
    how = config or (FP8_SCORES if is_fp8 else BF16_SCORES)
    assert q.numbers.dtype == keys.data.dtype and keys.data.is_contiguous()
    context, tokens = page_table.shape[1] * PAGE, max(1, how.columns // heads)
    out = torch.empty(t, context, dtype=torch.float32, device=page_table.device)
    if config is None and are_scored_by_hand(q):
        score_by_hand(q, keys, page_table, request, positions, out)
        return out
    _score_prompt[triton.cdiv(t, tokens), triton.cdiv(context, how.chunk)](
        tiled(q.numbers.view(t * heads, dim), tokens * heads, dim), q.weights, tiled(keys.data, PAGE, dim),
        q.weights if keys.scales is None else keys.scales, page_table, request, positions, out, t, context, how.chunk,
        page_table.stride(0), HEADS=heads, TOKENS=tokens, PAGE=PAGE, SCALED=keys.scales is not None,
        num_warps=how.warps, num_stages=how.stages,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["n_tokens", "table_stride"])
def _score_prompt(
    q, weights, keys, key_scales, page_table, request, positions, out, n_tokens, context, chunk, table_stride,
    HEADS: tl.constexpr, TOKENS: tl.constexpr, PAGE: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * TOKENS  # the longest contexts first
    start = tl.program_id(1) * chunk
    token = first + tl.arange(0, TOKENS)
    there = token < n_tokens
    position = tl.load(positions + token, mask=there, other=-1).to(tl.int32)
    if start <= tl.max(position, 0):
        owner = tl.load(request + token, mask=there, other=-1)
        column = tl.arange(0, TOKENS * HEADS)
        queries = q.load([first * HEADS, 0])
        w = tl.load(weights + first * HEADS + column, mask=first + column // HEADS < n_tokens, other=0.0)
        offset = tl.arange(0, PAGE)
        for i in range(TOKENS):  # one pass for each request that has tokens here: nearly always one in all
            mine = tl.load(request + tl.minimum(first + i, n_tokens - 1))
            before = tl.load(request + tl.minimum(first + tl.maximum(i - 1, 0), n_tokens - 1))
            seen = tl.max(tl.where(owner == mine, position, -1), 0)
            end = tl.where((i == 0) | (before != mine), tl.minimum(tl.minimum(start + chunk, context), seen + 1), start)
            pages = page_table + mine * table_stride
            following = tl.load(pages + start // PAGE).to(tl.int32)  # a step ahead
            for tile in range(start, end, PAGE):
                row = following * PAGE
                following = tl.load(pages + tl.minimum(tile + PAGE, context - PAGE) // PAGE).to(tl.int32)
                scores = dot(keys.load([row, 0]), queries.T, tl.zeros([PAGE, TOKENS * HEADS], tl.float32))
                scores = tl.maximum(scores, 0.0, propagate_nan=tl.PropagateNan.ALL)  # else a NaN would be a score of 0
                logits = tl.sum(tl.reshape(scores * w[None, :], [PAGE, TOKENS, HEADS]), 2)
                if SCALED:
                    logits *= tl.load(key_scales + row + offset)[:, None]
                key = tile + offset
                visible = (key[:, None] <= position[None, :]) & (owner == mine)[None, :]
                tl.store(out + token[None, :].to(tl.int64) * context + key[:, None], logits, mask=visible)
