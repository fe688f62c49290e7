"""Products of each head with a matrix of its own, for many tokens: into the latent space by `w_uk`, out by `w_uv`.

They move far more bytes than they compute: 403 and 336 MB for 8,192 tokens of 16 heads. So activations are read where
they lie, and are split into two BF16 numbers, or rounded to one, in registers. The result lies as the next kernel reads
it. The same programs rotate the queries' last columns, or add what several programs found of a token's attention.

Reference: `linear` and `rotate` in reference.py; `combine_splits` in attention/sparse_decode.py. Serves more than 8
tokens, weights in BF16. For fewer tokens: indexer/select.py, attention/sparse_decode.py.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.kernels.activations import dot, split_in_two
from saccade.kernels.launch import begin, uses_pdl, wait
from saccade.kernels.types import SPLIT_TOKENS, Parts, Rotation


class HeadTile(NamedTuple):
    """What a program has: tokens, columns of the result, columns of x in a step."""

    tokens: int
    width: int
    step: int


MANY_TILE = HeadTile(64, 128, 64)
FEW_TILE = HeadTile(16, 32, 64)  # up to SPLIT_TOKENS tokens, which in tiles of many are 16 programs
STEP_NUMBERS = 8192  # of x in a step, all parts together: three steps in flight fill half of the shared memory


@triton.jit(do_not_specialize=["T"])
def _multiply_heads(
    x, w, cos, sin, most, total, y, T, x_token, x_split, x_head, w_head, y_token, W_K: tl.constexpr,
    W_N: tl.constexpr, K: tl.constexpr, N: tl.constexpr, ROPE: tl.constexpr, SPLITS: tl.constexpr, SPAN: tl.constexpr,
    LOW: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y [T, heads, N + ROPE] = x [T, heads, K] @ w [heads, K, N]; behind it x's columns from K on, turned. With SPLITS
    x is [T, SPLITS, heads, K], and a token's are weighted: see `Parts`."""
    wait(PDL)
    begin(PDL)
    head = tl.program_id(1)
    token, n, k = tl.program_id(0) * BT + tl.arange(0, BT), tl.program_id(2) * BN + tl.arange(0, BN), tl.arange(0, BK)
    there = (token < T)[:, None]
    row = x + token.to(tl.int64)[:, None] * x_token + head * x_head
    w += head * w_head
    product = tl.zeros([BT, BN], tl.float32)
    if SPLITS > 1:
        split = tl.arange(0, SPAN)[None, :]
        is_one = there & (split < SPLITS)
        at = (token[:, None] * SPLITS + split) * tl.num_programs(1) + head
        tops = tl.load(most + at, mask=is_one, other=float("-inf"))
        share = tl.load(total + at, mask=is_one, other=0.0) * tl.exp2(tops - tl.max(tops, 1)[:, None])
        share = tl.where(is_one, share / tl.sum(share, 1)[:, None], 0.0)
        rows, is_part = row[:, :, None] + split[:, :, None] * x_split, (is_one & (share > 0))[:, :, None]
    for start in range(0, K, BK):
        if SPLITS > 1:
            mask = is_part & (k[None, None, :] < K - start)  # a part without rows is no number
            a = tl.sum(tl.load(rows + start + k[None, None, :], mask=mask, other=0.0) * share[:, :, None], 1)
        else:
            a = tl.load(row + start + k[None, :], mask=there & (k[None, :] < K - start), other=0.0)
        inside = (k[:, None] < K - start) & (n[None, :] < N)
        b = tl.load(w + (start + k[:, None]) * W_K + n[None, :] * W_N, mask=inside, other=0.0)
        high, low = split_in_two(a, tl.bfloat16)
        product = dot(high, b, product)
        if LOW:
            product = dot(low, b, product)
    out = y + token.to(tl.int64)[:, None] * y_token + head * (N + ROPE)
    tl.store(out + n[None, :], product, mask=there & (n[None, :] < N))
    if ROPE > 0 and tl.program_id(2) == 0:
        pair = tl.arange(0, ROPE // 2)[None, :]
        angle = token[:, None] * (ROPE // 2) + pair
        c, s = tl.load(cos + angle, mask=there, other=0.0), tl.load(sin + angle, mask=there, other=0.0)
        first = tl.load(row + K + 2 * pair, mask=there, other=0.0)
        second = tl.load(row + K + 2 * pair + 1, mask=there, other=0.0)
        tl.store(out + N + 2 * pair, first * c - second * s, mask=there)
        tl.store(out + N + 2 * pair + 1, second * c + first * s, mask=there)


def multiply_heads(
    x: Tensor | Parts, w: Tensor, rotation: Rotation | None = None, activations: str = "exact"
) -> Tensor:
    """f32 [T, heads, n] = x [T, heads, k] @ w [heads, k, n], which may be views; w in BF16. Of parts: of what they come
    to together.

    With `rotation`, x is [T, heads, k + rope] and y [T, heads, n + rope]: the last columns are turned, pairs being
    neighbours. "exact" activations keep 16 bits, others are rounded to BF16. Sums are fp32.
    """
    values, most, total = x if isinstance(x, Parts) else Parts(x[:, None], x, x)
    (tokens, splits, _, size), (heads, k, n) = values.shape, w.shape
    rope = 2 * rotation.cos.shape[1] if rotation is not None else 0
    assert values.stride(3) == 1 and values.shape[2] == heads, f"{tuple(values.shape)} for {heads} heads"
    assert size == k + rope, f"{size} numbers of a head, not {k} + {rope}"
    y = torch.empty(tokens, heads, n + rope, dtype=torch.float32, device=values.device)
    cos, sin = rotation or (y, y)
    tile = FEW_TILE if tokens <= SPLIT_TOKENS else MANY_TILE
    span, width = triton.next_power_of_2(splits), min(tile.width, max(16, triton.next_power_of_2(n)))
    step = min(tile.step, max(16, triton.next_power_of_2(k)), max(16, STEP_NUMBERS // (tile.tokens * span)))
    pdl = uses_pdl(y)
    _multiply_heads[triton.cdiv(tokens, tile.tokens), heads, triton.cdiv(n, width)](
        values, w, cos, sin, most, total, y, tokens, values.stride(0), values.stride(1), values.stride(2), w.stride(0),
        y.stride(0), W_K=w.stride(1), W_N=w.stride(2), K=k, N=n, ROPE=rope, SPLITS=splits, SPAN=span,
        LOW=activations == "exact", BT=tile.tokens, BN=width, BK=step, PDL=pdl, num_warps=4, num_stages=3,
        launch_pdl=pdl,
    )  # fmt: skip
    return y
