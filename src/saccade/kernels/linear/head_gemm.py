"""Products of each head with a matrix of its own, for many tokens: into the latent space by `w_uk`, out by `w_uv`.

They move far more bytes than they compute: 403 and 336 MB for 8,192 tokens of 16 heads. So activations are read where
they lie, and are split into two BF16 numbers, or rounded to one, in registers. The result lies as the next kernel reads
it. The same programs rotate the queries' last columns.

Reference: `linear` and `rotate` in reference.py. Serves more than 16 tokens, weights in BF16. For fewer tokens:
indexer/select.py, attention/sparse_decode.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.kernels.activations import dot, split_in_two
from saccade.kernels.types import Rotation

TOKENS, WIDTH, STEP = 64, 128, 64  # of a program: tokens, columns of the result, columns of x in a step


@triton.jit(do_not_specialize=["T"])
def _multiply_heads(
    x, w, cos, sin, y, T, x_token, x_head, w_head, y_token, W_K: tl.constexpr, W_N: tl.constexpr, K: tl.constexpr,
    N: tl.constexpr, ROPE: tl.constexpr, LOW: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """y [T, heads, N + ROPE] = x [T, heads, K] @ w [heads, K, N]; behind it x's columns from K on, turned."""
    head = tl.program_id(1)
    token, n, k = tl.program_id(0) * BT + tl.arange(0, BT), tl.program_id(2) * BN + tl.arange(0, BN), tl.arange(0, BK)
    there = (token < T)[:, None]
    row = x + token.to(tl.int64)[:, None] * x_token + head * x_head
    w += head * w_head
    total = tl.zeros([BT, BN], tl.float32)
    for start in range(0, K, BK):
        a = tl.load(row + start + k[None, :], mask=there & (k[None, :] < K - start), other=0.0)
        inside = (k[:, None] < K - start) & (n[None, :] < N)
        b = tl.load(w + (start + k[:, None]) * W_K + n[None, :] * W_N, mask=inside, other=0.0)
        high, low = split_in_two(a, tl.bfloat16)
        total = dot(high, b, total)
        if LOW:
            total = dot(low, b, total)
    out = y + token.to(tl.int64)[:, None] * y_token + head * (N + ROPE)
    tl.store(out + n[None, :], total, mask=there & (n[None, :] < N))
    if ROPE > 0 and tl.program_id(2) == 0:
        pair = tl.arange(0, ROPE // 2)[None, :]
        angle = token[:, None] * (ROPE // 2) + pair
        c, s = tl.load(cos + angle, mask=there, other=0.0), tl.load(sin + angle, mask=there, other=0.0)
        first = tl.load(row + K + 2 * pair, mask=there, other=0.0)
        second = tl.load(row + K + 2 * pair + 1, mask=there, other=0.0)
        tl.store(out + N + 2 * pair, first * c - second * s, mask=there)
        tl.store(out + N + 2 * pair + 1, second * c + first * s, mask=there)


def multiply_heads(x: Tensor, w: Tensor, rotation: Rotation | None = None, activations: str = "exact") -> Tensor:
    """f32 [T, heads, n] = x [T, heads, k] @ w [heads, k, n], both of which may be views; w in BF16.

    With `rotation`, x is [T, heads, k + rope] and y [T, heads, n + rope]: the last columns are turned, pairs being
    neighbours. "exact" activations keep 16 bits, others are rounded to BF16. Sums are fp32.
    """
    heads, k, n = w.shape
    rope = 2 * rotation.cos.shape[1] if rotation is not None else 0
    assert x.stride(2) == 1 and x.shape[1:] == (heads, k + rope), f"{tuple(x.shape)} for {heads} heads of {k} + {rope}"
    y = torch.empty(x.shape[0], heads, n + rope, dtype=torch.float32, device=x.device)
    cos, sin = rotation or (y, y)
    _multiply_heads[triton.cdiv(x.shape[0], TOKENS), heads, triton.cdiv(n, WIDTH)](
        x, w, cos, sin, y, x.shape[0], x.stride(0), x.stride(1), w.stride(0), y.stride(0), W_K=w.stride(1),
        W_N=w.stride(2), K=k, N=n, ROPE=rope, LOW=activations == "exact", BT=TOKENS,
        BN=min(WIDTH, max(16, triton.next_power_of_2(n))), BK=min(STEP, max(16, triton.next_power_of_2(k))),
        num_warps=4, num_stages=3,
    )  # fmt: skip
    return y
