"""Index keys of several tokens as one: pools, in plain torch.

A pool is `size` tokens in a row, and its key a mean of theirs, weighted for each dimension by a softmax over the pool
(GLM-5.3-Flash: softmax of gate + a bias for the place in the pool). It is complete when its last token has come, and
only then it can be selected; tokens of the last, incomplete pool are always seen. The keys and gates of the latest
tokens lie in a ring, by position, so that a rejected draft is simply written over. Next: pool_rows.py, select.py.
"""

import torch
from torch import Tensor

from saccade.kernels.types import Pooling, Selection


def pool_keys(key: Tensor, pooling: Pooling, positions: Tensor, first: Tensor, place: Tensor) -> Tensor:
    """f32 [T, dim]: at a pool's last token its key; elsewhere numbers that mean nothing.

    key: f32 [T, dim], after its norm. positions: i64 [T]. first: i64 [T], the position of each token's request with
    which this step begins. place: i64 [T], of each token's request in the ring of `pooling`.
    """
    size, ring = pooling.size, pooling.recent
    rows = torch.cat([key, pooling.gate], dim=1)  # [T, 2 * dim]
    back = torch.arange(size - 1, -1, -1, device=key.device)  # how many tokens before the pool's last
    at = positions[:, None] - back  # [T, size]
    row = (torch.arange(len(key), device=key.device)[:, None] - back).clamp(min=0)
    earlier = ring[place[:, None], at.clamp(min=0) % ring.shape[1]]
    members = torch.where((at >= first[:, None])[..., None], rows[row], earlier)  # [T, size, 2 * dim]
    keys, gates = members.chunk(2, dim=2)
    return ((gates + pooling.bias).softmax(1) * keys).sum(1)


def keep_recent(key: Tensor, pooling: Pooling, positions: Tensor, last: Tensor, place: Tensor) -> None:
    """Write the step's latest tokens into the ring. last: i64 [T], the position with which each token's request ends
    in this step: what lies further back than the ring is long is left out. Padding has place 0, which is nobody's."""
    ring = pooling.recent
    is_recent = positions > last - ring.shape[1]
    rows = torch.cat([key, pooling.gate], dim=1).to(ring.dtype)
    ring[torch.where(is_recent, place, 0), positions % ring.shape[1]] = rows


def expand_pools(pools: Selection, positions: Tensor, size: int) -> Selection:
    """i32 [T, K * size + size - 1]: the tokens of the selected pools [T, K], then those of the incomplete pool; none of
    these where nothing was selected of what there is, because scores were no numbers."""
    inside = torch.arange(size, device=pools.device, dtype=torch.int32)
    tokens = torch.where(pools[..., None] >= 0, pools[..., None] * size + inside, -1).flatten(1)
    count = (tokens >= 0).sum(1, keepdim=True)
    beyond = inside[: size - 1]
    tail = (positions[:, None] + 1) % size  # tokens of the incomplete pool
    width = tokens.shape[1] + size - 1
    is_known = (count > 0) | (positions[:, None] + 1 < size)
    column = torch.where((beyond < tail) & is_known, count + beyond, width)  # column `width` takes what is left out
    latest = (positions[:, None] + 1 - tail + beyond).to(torch.int32)
    out = torch.cat([tokens, tokens.new_full((len(tokens), size), -1)], dim=1)
    return out.scatter(1, column, latest)[:, :width]
