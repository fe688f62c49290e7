"""Thresholds between a row's best logits and the others: what the kernels of select.py and select_hopper.py share.

Called from Triton's language and from Gluon alike: operations on whatever is given, and no layouts.
"""

import triton
import triton.language as tl

WRONG = tl.constexpr(0x7FFFFFFE)  # the order of NaN and infinity: above all numbers, and the bits of a NaN


@triton.jit
def count_candidates(position, k, LEVEL: tl.constexpr, POOL: tl.constexpr, BLOCK: tl.constexpr):
    """Candidates of a token after LEVEL rounds in chunks: all chunks but the last gave k, so they lie without gaps."""
    n = position + 1
    if POOL > 1:
        n = n // POOL
    for _ in tl.static_range(LEVEL):
        before = (n - 1) // BLOCK
        n = before * k + tl.minimum(k, n - before * BLOCK)
    return n


@triton.jit
def to_order(x):
    """f32 as integers of the same order; both zeros are one. A NaN's is above all others, or below."""
    bits = x.to(tl.int32, bitcast=True)
    bits = tl.where(bits == -2147483648, 0, bits)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def to_number(order):
    """The f32 of such an integer."""
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def narrow(low, at_low, high, at_high, threshold, count, k):
    raises, lowers = (count >= k) & (threshold > low), (count < k) & (threshold < high)
    low, at_low = tl.where(raises, threshold, low), tl.where(raises, count, at_low)
    high, at_high = tl.where(lowers, threshold, high), tl.where(lowers, count, at_high)
    return low, at_low, high, at_high
