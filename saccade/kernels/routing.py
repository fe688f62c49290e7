"""The router in one kernel: a program a token, from scores to experts and weights.

In plain torch it is 15 passes over [tokens, experts]. Of equal scores the expert with the lowest number wins, and of
equal groups the first. What is chosen and why is in reference.py:route.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.kernels.gemm import linear


@triton.jit
def choose(
    scores, bias, experts, weights, scaling, GROUPS: tl.constexpr, SIZE: tl.constexpr, GROUP_ROOM: tl.constexpr,
    SIZE_ROOM: tl.constexpr, TOPK_GROUPS: tl.constexpr, TOPK: tl.constexpr, TOPK_ROOM: tl.constexpr,
):  # fmt: skip
    """scores [T, GROUPS * SIZE] before the sigmoid -> experts, weights [T, TOPK]."""
    token = tl.program_id(0)
    group = tl.arange(0, GROUP_ROOM)
    member = tl.arange(0, SIZE_ROOM)
    here = (group[:, None] < GROUPS) & (member[None, :] < SIZE)
    number = group[:, None] * SIZE + member[None, :]
    score = tl.sigmoid(tl.load(scores + token * GROUPS * SIZE + number, mask=here, other=0.0))
    choice = tl.where(here, score + tl.load(bias + number, mask=here, other=0.0), float("-inf"))
    # A group counts as its best two.
    first = tl.max(choice, 1)
    is_first = member[None, :] == tl.min(tl.where(choice == first[:, None], member[None, :], SIZE_ROOM), 1)[:, None]
    worth = first
    if SIZE > 1:
        worth += tl.max(tl.where(is_first, float("-inf"), choice), 1)
    worth = tl.where(group < GROUPS, worth, float("-inf"))
    is_open = group < 0
    for _ in tl.static_range(TOPK_GROUPS):
        left = tl.where(is_open | (group >= GROUPS), float("-inf"), worth)
        best = tl.min(tl.where((left == tl.max(left, 0)) & ~is_open & (group < GROUPS), group, GROUP_ROOM), 0)
        is_open = is_open | (group == best)
    choice = tl.where(is_open[:, None], choice, float("-inf"))
    place = tl.arange(0, TOPK_ROOM)
    taken = tl.zeros([TOPK_ROOM], tl.float32)
    total = 0.0
    for i in tl.static_range(TOPK):
        most = tl.max(tl.max(choice, 1), 0)
        best = tl.min(tl.min(tl.where((choice == most) & here, number, GROUPS * SIZE), 1), 0)
        best = tl.minimum(best, GROUPS * SIZE - 1)  # scores that are no numbers choose anything, but something
        value = tl.sum(tl.sum(tl.where(number == best, tl.where(here, score, 0.0), 0.0), 1), 0)
        tl.store(experts + token * TOPK + i, best.to(tl.int64))
        taken = tl.where(place == i, value, taken)
        total += value
        choice = tl.where(number == best, float("-inf"), choice)
    tl.store(weights + token * TOPK + place, taken / (total + 1e-20) * scaling, mask=place < TOPK)


def route(
    x: Tensor, gate: Tensor, bias: Tensor, groups: int, topk_groups: int, topk: int, scaling: float
) -> tuple[Tensor, Tensor]:
    """Choose experts: (i64 [T, topk], f32 weights [T, topk]), best first."""
    scores = linear(x, gate, torch.float32)
    tokens, size = scores.shape[0], scores.shape[1] // groups
    experts = torch.empty(tokens, topk, dtype=torch.int64, device=x.device)
    weights = torch.empty(tokens, topk, dtype=torch.float32, device=x.device)
    if tokens:
        choose[(tokens,)](
            scores, bias, experts, weights, scaling, GROUPS=groups, SIZE=size,
            GROUP_ROOM=triton.next_power_of_2(groups), SIZE_ROOM=triton.next_power_of_2(size),
            TOPK_GROUPS=topk_groups, TOPK=topk, TOPK_ROOM=triton.next_power_of_2(topk), num_warps=1,
        )  # fmt: skip
    return experts, weights
