"""The experts of up to 16 tokens in three launches: choose, expand, contract and add.

A program of `expand` owns a few hidden units of one of a token's experts. Tokens that share an expert read it again,
from the L2 cache: at 8 tokens 64 pairs meet about 57 different experts. A program that served all tokens of its expert
lost more than it read less: 22.3 ms a step at batch 8 against 15.8. The shared experts are one more. Each output row
is summed by one program in the order of the choice. To let every program of `expand` choose for itself saved a launch
and lost 5 us at batch 1. Reference: `route`, `expert_mlp` and `mlp` in reference.py. Next: rows.py.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.kernels.launch import begin, uses_pdl, wait
from saccade.kernels.matrix import Matrix
from saccade.kernels.rows import (
    BLOCK,
    INSIDE,
    WIDEST,
    Norm,
    Stream,
    as_operand,
    cut,
    find_factor,
    load_input,
    load_scales,
    load_strip,
    multiply_strip,
    store_stream,
    take_input,
)

EXPAND_BYTES = 57344  # of weights that a program holds
CONTRACT_ROWS = 8  # of the output, a program


class Routing(NamedTuple):
    """How tokens choose experts; see `route` in reference.py."""

    bias: Tensor  # f32 [experts]
    groups: int
    topk_groups: int
    topk: int
    scaling: float


@triton.jit
def _choose(
    logits, bias, ids, weights, scaling, E: tl.constexpr, GROUPS: tl.constexpr, GROUPS_UP: tl.constexpr,
    SIZE_UP: tl.constexpr, TOPK_GROUPS: tl.constexpr, TOPK: tl.constexpr, TOPK_UP: tl.constexpr, PDL: tl.constexpr,
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
    score = tl.sigmoid(tl.load(logits + token * E + expert, mask=is_real, other=0.0))
    choice = tl.where(is_real, score + biases, float("-inf"))
    if TOPK_GROUPS < GROUPS:
        worth, place = tl.max(choice, 1, return_indices=True)
        if SIZE > 1:
            worth += tl.max(tl.where(member[None, :] == place[:, None], float("-inf"), choice), 1)
        worth = tl.where(group < GROUPS, worth, float("-inf"))
        is_open = group < 0
        for _ in tl.static_range(TOPK_GROUPS):
            _, winner = tl.max(worth, 0, return_indices=True)
            is_open = is_open | (group == winner)
            worth = tl.where(group == winner, float("-inf"), worth)
        choice = tl.where(is_open[:, None], choice, float("-inf"))
    flat = tl.reshape(choice, [GROUPS_UP * SIZE_UP])
    scores = tl.reshape(score, [GROUPS_UP * SIZE_UP])
    place = tl.arange(0, GROUPS_UP * SIZE_UP)
    rank = tl.arange(0, TOPK_UP)
    chosen = tl.zeros([TOPK_UP], tl.int32)
    shares = tl.zeros([TOPK_UP], tl.float32)
    for i in tl.static_range(TOPK):
        _, winner = tl.max(flat, 0, return_indices=True)
        flat = tl.where(place == winner, float("-inf"), flat)
        # Scores that are no numbers choose anything, but something that is there.
        its = tl.minimum((winner // SIZE_UP) * SIZE + winner % SIZE_UP, E - 1)
        chosen = tl.where(rank == i, its, chosen)
        shares = tl.where(rank == i, tl.sum(tl.where(place == winner, scores, 0.0), 0), shares)
    tl.store(ids + token * TOPK + rank, chosen, mask=rank < TOPK)
    shares = shares / (tl.sum(shares, 0) + 1e-20) * scaling
    tl.store(weights + token * TOPK + rank, shares, mask=rank < TOPK)


@triton.jit
def _load_units(w, unit, N, K, STRIP: tl.constexpr, HELD: tl.constexpr, EVEN: tl.constexpr):
    """The first HELD strips of the gate rows of `unit`, and of its up rows, which lie N rows below."""
    gates, ups = (), ()
    for i in tl.static_range(HELD):
        gates = gates + (load_strip(w, unit, N, i * STRIP, K, STRIP, EVEN),)
        ups = ups + (load_strip(w, N + unit, 2 * N, i * STRIP, K, STRIP, EVEN),)
    return gates, ups


@triton.jit
def _expand_units(
    x, gain, eps, out, w, scale, gates, ups, N, K, first,
    BN: tl.constexpr, STRIP: tl.constexpr, STRIPS: tl.constexpr, HELD: tl.constexpr, CODED: tl.constexpr,
    NORM: tl.constexpr, COUNT: tl.constexpr, COUNT_UP: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """out[i] = silu(gate_i . norm(x)) * (up_i . norm(x)) for BN units from `first` on, whose weights are held."""
    unit = first + tl.arange(0, BN)
    gate_scale = scale + (first // 128) * tl.cdiv(K, 128)
    up_scale = scale + ((N + first) // 128) * tl.cdiv(K, 128)
    gate = tl.zeros([STRIP // 4, BN], tl.float32)
    up = tl.zeros([STRIP // 4, BN], tl.float32)
    squares = tl.zeros([STRIP // 4], tl.float32)
    for i in tl.static_range(STRIPS):
        a = load_input(x, i * STRIP, K, STRIP, EVEN)
        if NORM == INSIDE:
            squares += tl.sum(a * a, 1)
            a = a * load_input(gain, i * STRIP, K, STRIP, EVEN)
        s, t = load_scales(gate_scale, i * STRIP, K, STRIP, CODED), load_scales(up_scale, i * STRIP, K, STRIP, CODED)
        if i < HELD:
            gate += multiply_strip(gates[i], a, s, CODED)
            up += multiply_strip(ups[i], a, t, CODED)
        else:
            gate += multiply_strip(load_strip(w, unit, N, i * STRIP, K, STRIP, EVEN), a, s, CODED)
            up += multiply_strip(load_strip(w, N + unit, 2 * N, i * STRIP, K, STRIP, EVEN), a, t, CODED)
    if NORM == INSIDE:  # noqa: SIM108
        factor = tl.rsqrt(tl.sum(squares, 0) / K + eps)
    else:
        factor = find_factor(gain, COUNT, COUNT_UP, K, eps)
    g, u = tl.sum(gate, 0) * factor, tl.sum(up, 0) * factor
    tl.store(out + unit, g * tl.sigmoid(g) * u, mask=unit < N)


@triton.jit
def _expand(
    x, gain, ids, out, w, scale, shared, shared_scale, T, K, N, SHARED_N, eps,
    TOPK: tl.constexpr, BN: tl.constexpr, SHARED_BN: tl.constexpr, STRIP: tl.constexpr, STRIPS: tl.constexpr,
    HELD: tl.constexpr, CODED: tl.constexpr, SHARED_CODED: tl.constexpr, NORM: tl.constexpr, COUNT: tl.constexpr,
    COUNT_UP: tl.constexpr, EVEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    begin(PDL)
    program = tl.program_id(0)
    shared_programs = tl.cdiv(SHARED_N, SHARED_BN)
    width = TOPK * N + SHARED_N
    if program < T * shared_programs:
        token, first = program // shared_programs, program % shared_programs * SHARED_BN
        gates, ups = _load_units(shared, first + tl.arange(0, SHARED_BN), SHARED_N, K, STRIP, HELD, EVEN)
        wait(PDL)
        _expand_units(x + token * K, gain, eps, out + token * width + TOPK * N, shared, shared_scale, gates, ups,
                      SHARED_N, K, first, SHARED_BN, STRIP, STRIPS, HELD, SHARED_CODED, NORM, COUNT, COUNT_UP,
                      EVEN)  # fmt: skip
    else:
        if TOPK > 0:
            program -= T * shared_programs
            programs = tl.cdiv(N, BN)
            pair, first = program // programs, program % programs * BN
            token = pair // TOPK
            wait(PDL)
            expert = tl.load(ids + pair)
            w += expert.to(tl.int64) * 2 * N * K
            scale += expert * tl.cdiv(2 * N, 128) * tl.cdiv(K, 128)
            gates, ups = _load_units(w, first + tl.arange(0, BN), N, K, STRIP, HELD, EVEN)
            _expand_units(x + token * K, gain, eps, out + token * width + pair % TOPK * N, w, scale, gates, ups, N, K,
                          first, BN, STRIP, STRIPS, HELD, CODED, NORM, COUNT, COUNT_UP, EVEN)  # fmt: skip


@triton.jit
def _contract(
    x, hidden, ids, weights, out, w, scale, shared, shared_scale, next_gain, scaled, parts, ROWS, N, SHARED_N,
    TOPK: tl.constexpr, BN: tl.constexpr, STRIP: tl.constexpr, STRIPS: tl.constexpr, CODED: tl.constexpr,
    EVEN: tl.constexpr, SHARED_STRIP: tl.constexpr, SHARED_STRIPS: tl.constexpr, SHARED_CODED: tl.constexpr,
    SHARED_EVEN: tl.constexpr, STREAM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out[row] = x[row] + sum over experts of weight * (down[row] . hidden) + shared[row] . hidden, in this order."""
    begin(PDL)
    first, token = tl.program_id(0) * BN, tl.program_id(1)
    row = first + tl.arange(0, BN)
    hidden += token * (TOPK * N + SHARED_N)
    held = load_strip(shared, row, ROWS, 0, SHARED_N, SHARED_STRIP, SHARED_EVEN)
    shared_scale += (first // 128) * tl.cdiv(SHARED_N, 128)
    scale += (first // 128) * tl.cdiv(N, 128)
    wait(PDL)
    y = tl.load(x + token * ROWS + row, mask=row < ROWS, other=0.0)
    if TOPK > 0:
        sums = tl.zeros([STRIP // 4, BN], tl.float32)
        strips, factors = (), ()
        for i in tl.static_range(TOPK):  # all of them are asked for before the first is used
            expert = tl.load(ids + token * TOPK + i)
            its_scale = scale + expert * tl.cdiv(ROWS, 128) * tl.cdiv(N, 128)
            for j in tl.static_range(STRIPS):
                strip = load_strip(w + expert.to(tl.int64) * ROWS * N, row, ROWS, j * STRIP, N, STRIP, EVEN)
                strips = strips + (strip,)
                factors = factors + (load_scales(its_scale, j * STRIP, N, STRIP, CODED),)
        for i in tl.static_range(TOPK):
            weight = tl.load(weights + token * TOPK + i)
            for j in tl.static_range(STRIPS):
                a = load_input(hidden + i * N, j * STRIP, N, STRIP, EVEN) * weight
                sums += multiply_strip(strips[i * STRIPS + j], a, factors[i * STRIPS + j], CODED)
        y += tl.sum(sums, 0)
    hidden += TOPK * N
    sums_shared = tl.zeros([SHARED_STRIP // 4, BN], tl.float32)
    for j in tl.static_range(SHARED_STRIPS):
        a = load_input(hidden, j * SHARED_STRIP, SHARED_N, SHARED_STRIP, SHARED_EVEN)
        s = load_scales(shared_scale, j * SHARED_STRIP, SHARED_N, SHARED_STRIP, SHARED_CODED)
        if j > 0:
            held = load_strip(shared, row, ROWS, j * SHARED_STRIP, SHARED_N, SHARED_STRIP, SHARED_EVEN)
        sums_shared += multiply_strip(held, a, s, SHARED_CODED)
    y += tl.sum(sums_shared, 0)
    if STREAM:
        store_stream(y, out, row, ROWS, next_gain, scaled, parts + tl.program_id(0))
    else:
        tl.store(out + token * ROWS + row, y, mask=row < ROWS)


def choose(logits: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
    """Expert ids i32 and weights f32 [T, topk] from the router's logits f32 [T, experts]."""
    tokens, e = logits.shape
    ids = torch.empty(tokens, routing.topk, dtype=torch.int32, device=logits.device)
    weights = torch.empty(tokens, routing.topk, dtype=torch.float32, device=logits.device)
    uses = uses_pdl(logits)
    _choose[tokens,](
        logits, routing.bias, ids, weights, routing.scaling, E=e, GROUPS=routing.groups,
        GROUPS_UP=triton.next_power_of_2(routing.groups), SIZE_UP=triton.next_power_of_2(e // routing.groups),
        TOPK_GROUPS=routing.topk_groups, TOPK=routing.topk, TOPK_UP=triton.next_power_of_2(routing.topk), PDL=uses,
        num_warps=1, launch_pdl=uses,
    )  # fmt: skip
    return ids, weights


def expand(
    x: Tensor | Stream,
    norm: Norm,
    gate_up: Matrix,
    ids: Tensor | None = None,
    experts: Matrix | None = None,
    tile_bytes: int = EXPAND_BYTES,
    widest: int | None = None,
) -> Tensor:
    """Hidden units silu(gate) * up, f32 [T, topk * n + shared n]: those of the experts `ids` i32 [T, topk], in that
    order, then the shared ones.

    x: f32 [T, k], before `norm`. gate_up [2 * shared n, k] is every token's, experts [experts, 2n, k] are chosen from;
    without them this is a dense MLP's first half.
    """
    given, gain, count, mode = take_input(x, norm)
    tokens, k = given.shape
    how = cut(k, widest or WIDEST)
    shared = as_operand(gate_up)
    routed = shared if experts is None else as_operand(experts)
    topk = 0 if ids is None else ids.shape[1]
    shared_n, n = shared.data.shape[0] // 2, routed.data.shape[-2] // 2 if topk else 0
    rows = [find_rows(o.data.element_size(), how.width * how.held, tile_bytes) for o in (routed, shared)]
    out = torch.empty(tokens, topk * n + shared_n, dtype=torch.float32, device=given.device)
    uses = uses_pdl(given)
    _expand[tokens * (-(-shared_n // rows[1])) + tokens * topk * (-(-n // rows[0])),](
        given, gain, out if ids is None else ids, out, routed.data, routed.scale, shared.data, shared.scale,
        tokens, k, n, shared_n, norm.eps, TOPK=topk, BN=rows[0], SHARED_BN=rows[1], STRIP=how.width,
        STRIPS=how.strips, HELD=how.held, CODED=routed.is_coded, SHARED_CODED=shared.is_coded, NORM=mode, COUNT=count,
        COUNT_UP=triton.next_power_of_2(count), EVEN=how.is_even, PDL=uses, num_warps=how.warps, launch_pdl=uses,
    )  # fmt: skip
    return out


def find_rows(item: int, columns: int, tile_bytes: int) -> int:
    """Hidden units a program takes; each is two rows."""
    return max(1, min(16, 1 << max(tile_bytes // (2 * item * columns), 1).bit_length() - 1))


def contract(
    x: Tensor,
    hidden: Tensor,
    down: Matrix,
    chosen: tuple[Tensor, Tensor] | None = None,
    experts: Matrix | None = None,
    rows: int = CONTRACT_ROWS,
) -> Tensor:
    """f32 [T, k] = x + sum of weight * (down . hidden) over the experts `chosen` (ids and weights) + the shared ones'.

    down: [k, shared n]; experts: [experts, k, n]; hidden: what `expand` gave.
    """
    return _launch_contract(x, hidden, down, chosen, experts, None, rows)[0]


def contract_into(
    x: Tensor,
    hidden: Tensor,
    down: Matrix,
    chosen: tuple[Tensor, Tensor] | None,
    experts: Matrix | None,
    following: Norm,
) -> Stream:
    """The same for one token, prepared for the norm that follows."""
    return Stream(*_launch_contract(x, hidden, down, chosen, experts, following, CONTRACT_ROWS))


def _launch_contract(
    x: Tensor, hidden: Tensor, down: Matrix, chosen: tuple[Tensor, Tensor] | None, experts: Matrix | None,
    following: Norm | None, rows: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    shared = as_operand(down)
    held = shared if experts is None else as_operand(experts)
    ids, weights = chosen if chosen is not None else (x, x)
    topk = ids.shape[1] if chosen is not None else 0
    k, shared_n = shared.data.shape
    n = held.data.shape[-1] if topk else BLOCK
    its, common = cut(n, 512), cut(shared_n, 512)
    warps = max(its.warps if topk else 1, 2)
    out, programs, uses = torch.empty_like(x), -(-k // rows), uses_pdl(x)
    scaled, squares = (torch.empty_like(out), out.new_empty(1, programs)) if following else (out, out)
    _contract[programs, x.shape[0]](
        x, hidden, ids, weights, out, held.data, held.scale, shared.data, shared.scale,
        following.weight if following else out, scaled, squares, k, n if topk else 0, shared_n,
        TOPK=topk, BN=rows, STRIP=its.width, STRIPS=its.strips, CODED=held.is_coded, EVEN=its.is_even,
        SHARED_STRIP=common.width, SHARED_STRIPS=common.strips, SHARED_CODED=shared.is_coded,
        SHARED_EVEN=common.is_even, STREAM=following is not None, PDL=uses, num_warps=warps, launch_pdl=uses,
    )  # fmt: skip
    return out, scaled, squares
