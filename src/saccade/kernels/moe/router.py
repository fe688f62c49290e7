"""Which experts a token takes, by the router's logits.

One program of one warp a token. If every program of gate_up chose for itself, a launch was saved and 5 us lost at batch
1. If the router's last program chose, a launch was saved too and 0.7 us lost. Reference: `choose_experts` in
reference.py. Serves any number of tokens. Next: gate_up.py and down.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.kernels.indexer.thresholds import to_order
from saccade.kernels.launch import begin, uses_pdl, wait
from saccade.kernels.types import Chosen, Routing


@triton.jit
def _choose(
    logits, bias, ids, weights, scaling, stride, E: tl.constexpr, GROUPS: tl.constexpr, GROUPS_UP: tl.constexpr,
    SIZE_UP: tl.constexpr, TOPK_GROUPS: tl.constexpr, TOPK: tl.constexpr, TOPK_UP: tl.constexpr, FIRST: tl.constexpr,
    LAST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Best first; of equal ones the lowest id. One program a token, of one warp: nothing passes through memory."""
    begin(PDL)
    token = tl.program_id(0)
    SIZE: tl.constexpr = E // GROUPS
    group = tl.arange(0, GROUPS_UP)
    member = tl.arange(0, SIZE_UP)
    expert = group[:, None] * SIZE + member[None, :]
    is_real = (group < GROUPS)[:, None] & (member < SIZE)[None, :]
    biases = tl.load(bias + expert, mask=is_real, other=0.0)
    wait(PDL)
    score = tl.sigmoid(tl.load(logits + token * stride + expert, mask=is_real, other=0.0))
    choice = tl.where(is_real, score + biases, float("-inf"))
    wrong = tl.max(tl.max((is_real & ~(tl.abs(choice) < float("inf"))).to(tl.int32), 1), 0)
    if TOPK_GROUPS < GROUPS:
        worth, place = tl.max(choice, 1, return_indices=True)
        if SIZE > 1:
            worth += tl.max(tl.where(member[None, :] == place[:, None], float("-inf"), choice), 1)
        worth = tl.where(group < GROUPS, worth, float("-inf"))
        other = tl.reshape(worth, [1, GROUPS_UP])
        is_better = (other > worth[:, None]) | ((other == worth[:, None]) & (group[None, :] < group[:, None]))
        is_open = tl.sum(is_better.to(tl.int32), 1) < TOPK_GROUPS
        choice = tl.where(is_open[:, None], choice, float("-inf"))
    # Integers: a warp has one instruction for their maximum, where a float and its place take ten.
    order = tl.reshape(to_order(choice), [GROUPS_UP * SIZE_UP])
    scores = tl.reshape(score, [GROUPS_UP * SIZE_UP]).to(tl.int32, bitcast=True)
    place = tl.arange(0, GROUPS_UP * SIZE_UP)
    rank = tl.arange(0, TOPK_UP)
    chosen = tl.zeros([TOPK_UP], tl.int32)
    shares = tl.zeros([TOPK_UP], tl.int32)
    for i in tl.static_range(TOPK):
        winner = tl.min(tl.where(order == tl.max(order, 0), place, GROUPS_UP * SIZE_UP), 0)
        order = tl.where(place == winner, -2147483648, order)
        # Scores that are no numbers choose anything, but something that is there.
        its = tl.minimum((winner // SIZE_UP) * SIZE + winner % SIZE_UP, E - 1)
        chosen = tl.where(rank == i, its, chosen)
        shares = tl.where(rank == i, tl.sum(tl.where(place == winner, scores, 0), 0), shares)
    shares = tl.where(rank < TOPK, shares.to(tl.float32, bitcast=True), 0.0)
    shares = tl.where(wrong > 0, float("nan"), shares / (tl.sum(shares, 0) + 1e-20) * scaling)
    if LAST - FIRST < E:  # others are another rank's
        is_own = (chosen >= FIRST) & (chosen < LAST)
        chosen = tl.where(is_own, chosen - FIRST, -1)
        shares = tl.where(is_own, shares, 0.0)
    tl.store(ids + token * TOPK + rank, chosen, mask=rank < TOPK)
    tl.store(weights + token * TOPK + rank, shares, mask=rank < TOPK)


def choose_experts(logits: Tensor, routing: Routing) -> Chosen:
    """Expert ids i32 and weights f32 [T, topk] from the router's logits f32 [T, experts], whose rows may be strided.
    Where one of these or a bias is not finite, all weights are NaN."""
    tokens, e = logits.shape
    ids = torch.empty(tokens, routing.topk, dtype=torch.int32, device=logits.device)
    weights = torch.empty(tokens, routing.topk, dtype=torch.float32, device=logits.device)
    (first, last), uses = routing.own or (0, e), uses_pdl(logits)
    _choose[tokens,](
        logits, routing.bias, ids, weights, routing.scaling, logits.stride(0), E=e, GROUPS=routing.groups,
        GROUPS_UP=triton.next_power_of_2(routing.groups), SIZE_UP=triton.next_power_of_2(e // routing.groups),
        TOPK_GROUPS=routing.topk_groups, TOPK=routing.topk, TOPK_UP=triton.next_power_of_2(routing.topk), FIRST=first,
        LAST=last, PDL=uses, num_warps=1, launch_pdl=uses,
    )  # fmt: skip
    return ids, weights
