"""Kimi delta attention (KDA), token by token in plain torch: the specification.

Each head keeps a matrix. A token lets it decay, by a factor of its own for each dimension of the key; then replaces,
by the share beta, what the matrix answers to its key with its value; then asks it with its query (Kimi Linear report,
section 3). Queries, keys and values pass a short causal convolution before.

What a step may still take back is not in the matrix yet: a request's state is the matrix before position `base`, and
the inputs of the tokens since then, in a ring by position. The next step's first position says how many of them were
kept. So a rejected draft costs nothing to undo, and a state is read and written once a step. Next: operations.py of
models/glm5_next.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

NORM_EPS = 1e-6  # inside of the root that queries and keys are divided by, as in flash-linear-attention


class DeltaWeights(NamedTuple):
    """Parameters of one layer's recurrence, of this rank's heads."""

    conv: Tensor  # f32 [3 * heads * dim, width]: of queries, keys, values
    decay: Tensor  # f32 [heads]: A_log
    bias: Tensor  # f32 [heads * dim]: of the decay
    lower_bound: float  # of the decay's logarithm, below zero
    heads: int
    dim: int


class DeltaState(NamedTuple):
    """Of every request. Place 0 is nobody's."""

    matrix: Tensor  # f32 [places, heads, dim, dim]: key by value, before position `base`
    base: Tensor  # f32 [places, heads]: the same of all heads, each of which writes its own
    # f32 [places, ring, 4 * heads * dim + heads]: inputs of the latest tokens, see `run_delta`. The ring holds those
    # that may be taken back, and those that the convolution of the first of them sees.
    recent: Tensor


def find_decay(forget: Tensor, delta: DeltaWeights) -> Tensor:
    """f32 [T, heads, dim], logarithms of decays: lower_bound * sigmoid(exp(A_log) * (forget + bias))."""
    rate = delta.decay.exp()[:, None]
    return delta.lower_bound * torch.sigmoid(rate * (forget + delta.bias).unflatten(1, (delta.heads, delta.dim)))


def run_delta(inputs: Tensor, delta: DeltaWeights, state: DeltaState, place: int, start: int) -> Tensor:
    """f32 [T, heads, dim] of a request's T tokens in a row, which begin at position `start`; its state goes on.

    inputs: f32 [T, 4 * heads * dim + heads]: queries, keys and values before their convolution, logarithms of decays,
    and beta.
    """
    base, ring = int(state.base[place, 0]), state.recent.shape[1]
    width, tokens = delta.conv.shape[1], len(inputs)
    pending = start - base
    before = pending + width - 1  # tokens in front of this step that are read: their places in the ring are theirs
    at = torch.arange(start - before, start, device=inputs.device)
    earlier = torch.where((at >= 0)[:, None], state.recent[place, at % ring], 0.0)
    rows = torch.cat([earlier, inputs])
    moved = F.silu((rows[:, : len(delta.conv)].unfold(0, width, 1) * delta.conv).sum(2))  # [pending + T, 3 * n]
    q, k, v = (x.unflatten(1, (delta.heads, delta.dim)) for x in moved.chunk(3, dim=1))
    q, k = divide_by_norm(q) * delta.dim**-0.5, divide_by_norm(k)
    decay, beta = rows[width - 1 :, len(delta.conv) :].split([delta.heads * delta.dim, delta.heads], dim=1)
    decay = decay.unflatten(1, (delta.heads, delta.dim)).exp()
    matrix, seen = state.matrix[place].clone(), torch.empty_like(q[pending:])
    is_kept = tokens > ring - width + 1  # a chunk of a prompt, of which nothing is taken back
    for t in range(pending + tokens):
        if t == pending and not is_kept:
            state.matrix[place] = matrix
        matrix = matrix * decay[t][..., None]
        missing = (v[t] - (matrix * k[t][..., None]).sum(1)) * beta[t][:, None]
        matrix = matrix + k[t][..., None] * missing[:, None]
        if t >= pending:
            seen[t - pending] = (matrix * q[t][..., None]).sum(1)
    if is_kept:
        state.matrix[place] = matrix
    state.base[place] = start + tokens if is_kept else start
    latest = torch.arange(max(0, tokens - ring), tokens, device=inputs.device)
    state.recent[place, (start + latest) % ring] = inputs[latest]
    return seen


def divide_by_norm(x: Tensor) -> Tensor:
    """x / sqrt(sum(x^2) + eps), over the last dimension."""
    return x / torch.sqrt(x.square().sum(-1, keepdim=True) + NORM_EPS)
