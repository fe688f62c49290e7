"""Which experts a token takes, by the router's logits. Next: expand.py and contract.py, which run them.

For one token the router's last program chooses, which saves a launch. To let every program of `expand` choose for
itself saved it too, and lost 5 us. Reference: `route` in reference.py.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.kernels.launch import begin, uses_pdl, wait
from saccade.kernels.rows import AHEAD, Stream, cut, run_rows
from saccade.kernels.select import to_order

Chosen = tuple[Tensor, Tensor]  # expert ids i32 and their weights f32, [T, topk] both
STRIP = 1024  # columns of the router that its programs take at once: 32 a thread


class Routing(NamedTuple):
    """How tokens choose experts; see `route` in reference.py."""

    bias: Tensor  # f32 [experts]
    groups: int
    topk_groups: int
    topk: int
    scaling: float


@triton.jit
def _choose_of(
    logits, biases, ids, weights, scaling, E: tl.constexpr, GROUPS: tl.constexpr, GROUPS_UP: tl.constexpr,
    SIZE_UP: tl.constexpr, TOPK_GROUPS: tl.constexpr, TOPK: tl.constexpr, TOPK_UP: tl.constexpr,
):  # fmt: skip
    """A token's experts, best first; of equal ones the lowest id. logits, biases: [GROUPS_UP, SIZE_UP]."""
    SIZE: tl.constexpr = E // GROUPS
    group = tl.arange(0, GROUPS_UP)
    member = tl.arange(0, SIZE_UP)
    is_real = (group < GROUPS)[:, None] & (member < SIZE)[None, :]
    score = tl.sigmoid(logits)
    choice = tl.where(is_real, score + biases, float("-inf"))
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
    tl.store(ids + rank, chosen, mask=rank < TOPK)
    shares = shares / (tl.sum(shares, 0) + 1e-20) * scaling
    tl.store(weights + rank, shares, mask=rank < TOPK)


@triton.jit
def _lay_out(E: tl.constexpr, GROUPS: tl.constexpr, GROUPS_UP: tl.constexpr, SIZE_UP: tl.constexpr):
    """Experts by group: their ids, and which of the places are real; [GROUPS_UP, SIZE_UP] both."""
    group, member = tl.arange(0, GROUPS_UP), tl.arange(0, SIZE_UP)
    SIZE: tl.constexpr = E // GROUPS
    return group[:, None] * SIZE + member[None, :], (group < GROUPS)[:, None] & (member < SIZE)[None, :]


@triton.jit
def _choose(
    logits, bias, ids, weights, scaling, E: tl.constexpr, GROUPS: tl.constexpr, GROUPS_UP: tl.constexpr,
    SIZE_UP: tl.constexpr, TOPK_GROUPS: tl.constexpr, TOPK: tl.constexpr, TOPK_UP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program a token, of one warp: nothing passes through memory."""
    begin(PDL)
    token = tl.program_id(0)
    expert, is_real = _lay_out(E, GROUPS, GROUPS_UP, SIZE_UP)
    biases = tl.load(bias + expert, mask=is_real, other=0.0)
    wait(PDL)
    x = tl.load(logits + token * E + expert, mask=is_real, other=0.0)
    _choose_of(x, biases, ids + token * TOPK, weights + token * TOPK, scaling, E, GROUPS, GROUPS_UP, SIZE_UP,
               TOPK_GROUPS, TOPK, TOPK_UP)  # fmt: skip


@triton.jit
def _route(
    x, squares, gate, bias, logits, counter, ids, weights, scaling, K, eps, E: tl.constexpr, GROUPS: tl.constexpr,
    GROUPS_UP: tl.constexpr, SIZE_UP: tl.constexpr, TOPK_GROUPS: tl.constexpr, TOPK: tl.constexpr,
    TOPK_UP: tl.constexpr, STRIP: tl.constexpr, STRIPS: tl.constexpr, HELD: tl.constexpr, COUNT: tl.constexpr,
    COUNT_UP: tl.constexpr, EVEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A program of one warp an expert; the last to end chooses, and leaves `counter` at zero."""
    begin(PDL)
    program = tl.program_id(0)
    expert, is_real = _lay_out(E, GROUPS, GROUPS_UP, SIZE_UP)
    biases = tl.load(bias + expert, mask=is_real, other=0.0)
    run_rows(x, squares, eps, logits, logits, gate, gate, E, K, program, 0, logits, logits, logits, 1, STRIP, STRIPS,
             HELD, False, AHEAD, COUNT, COUNT_UP, False, False, EVEN, PDL)  # fmt: skip
    tl.debug_barrier()
    if tl.atomic_add(counter, 1, sem="acq_rel") == E - 1:
        tl.store(counter, 0)
        found = tl.load(logits + expert, mask=is_real, other=0.0, cache_modifier=".cg")
        _choose_of(found, biases, ids, weights, scaling, E, GROUPS, GROUPS_UP, SIZE_UP, TOPK_GROUPS, TOPK, TOPK_UP)


def choose(logits: Tensor, routing: Routing) -> Chosen:
    """Expert ids i32 and weights f32 [T, topk] from the router's logits f32 [T, experts]."""
    tokens, e = logits.shape
    ids, weights, uses = *_make_room(tokens, routing, logits.device), uses_pdl(logits)
    _choose[tokens,](
        logits, routing.bias, ids, weights, routing.scaling, **_sizes(routing), PDL=uses, num_warps=1, launch_pdl=uses
    )
    return ids, weights


def route_one(x: Stream, gate: Tensor, eps: float, routing: Routing, counter: Tensor) -> Chosen:
    """The same for one token, from what stands before the router's norm; gate: [experts, k].

    counter: i32 [1], zero before and after: launches that may overlap must not share it.
    """
    k, how = gate.shape[1], cut(gate.shape[1], STRIP)
    ids, weights, uses = *_make_room(1, routing, gate.device), uses_pdl(gate)
    logits, count = torch.empty(len(gate), device=gate.device), x.squares.shape[1]
    _route[len(gate),](
        x.scaled, x.squares, gate, routing.bias, logits, counter, ids, weights, routing.scaling, k, eps,
        **_sizes(routing), STRIP=how.width, STRIPS=how.strips, HELD=how.held, COUNT=count,
        COUNT_UP=triton.next_power_of_2(count), EVEN=how.is_even, PDL=uses, num_warps=1, launch_pdl=uses,
    )  # fmt: skip
    return ids, weights


def _make_room(tokens: int, routing: Routing, device: torch.device) -> Chosen:
    shape = (tokens, routing.topk)
    return torch.empty(shape, dtype=torch.int32, device=device), torch.empty(shape, device=device)


def _sizes(routing: Routing) -> dict[str, int]:
    e = len(routing.bias)
    return {
        "E": e, "GROUPS": routing.groups, "GROUPS_UP": triton.next_power_of_2(routing.groups),
        "SIZE_UP": triton.next_power_of_2(e // routing.groups), "TOPK_GROUPS": routing.topk_groups,
        "TOPK": routing.topk, "TOPK_UP": triton.next_power_of_2(routing.topk),
    }  # fmt: skip
