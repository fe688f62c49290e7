"""The two halves of the experts' MLP for few tokens, apart from the model: columns and hidden units that fill no chunk."""

from math import inf

import pytest
import torch
from coded_matrices import encoded

from saccade.kernels import reference
from saccade.kernels.activations import write_activations
from saccade.kernels.embed import embed_with_angles
from saccade.kernels.moe import grouped_gemm
from saccade.kernels.moe.down import DownConfig, run_down, run_down_into
from saccade.kernels.moe.gate_up import GateUpConfig, run_gate_up, shares_scales
from saccade.kernels.moe.packed import packed_experts
from saccade.kernels.moe.router import choose_experts
from saccade.kernels.residual import PreparedResidual, get_values
from saccade.kernels.types import GEMV_TOKENS, Matrix, Norm, Routing

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EXPERTS, TOPK = 4, 2
UP = GateUpConfig(32, 64, 1)  # three chunks of columns
DOWN = DownConfig(4096, 64, 1)  # two of hidden units


def make(dice: torch.Generator, is_coded: bool, *shape: int) -> Matrix:
    numbers = torch.randn(shape, generator=dice)
    if not is_coded:
        return Matrix((numbers / shape[-1] ** 0.5).bfloat16().to(DEVICE))
    *many, n, k = shape
    scale = torch.rand(*many, -(-n // 128), -(-k // 128), generator=dice) / k**0.5
    return Matrix(numbers.to(torch.float8_e4m3fn).to(DEVICE), scale.to(DEVICE))


@pytest.mark.parametrize("value", [torch.nan, -torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("groups", [1, 4])
def test_a_choice_among_what_is_not_finite_has_no_weights(value: float, groups: int) -> None:
    dice = torch.Generator().manual_seed(0)
    logits, bias = torch.randn(5, 16, generator=dice), torch.randn(16, generator=dice)
    for place in range(0, 16, 3):  # among the best, and not
        spoiled = bias.clone()
        spoiled[place] = value
        routing = Routing(spoiled.to(DEVICE), groups, min(groups, 2), TOPK, 2.5)
        for found in (choose_experts, reference.choose_experts):
            assert found(logits.to(DEVICE), routing)[1].isnan().all()
    logits[2, 7] = torch.nan
    ids, weights = choose_experts(logits.to(DEVICE), Routing(bias.to(DEVICE), groups, min(groups, 2), TOPK, 2.5))
    assert weights.isnan().any(1).tolist() == [False, False, True, False, False]
    assert ((ids >= 0) & (ids < 16)).all()


@pytest.mark.parametrize("is_coded", [True, False], ids=["FP8", "BF16"])
@pytest.mark.parametrize(
    ("tokens", "k", "n", "shared_n"),
    [(3, 160, 128, 128), (1, 96, 128, 256), (2, 96, 48, 40), (5, 96, 48, 40), (9, 96, 32, 32)],
)
def test_experts_of_few_tokens(is_coded: bool, tokens: int, k: int, n: int, shared_n: int) -> None:
    dice = torch.Generator().manual_seed(0)
    x, gain = torch.randn(tokens, k, generator=dice).to(DEVICE), torch.rand(k, generator=dice).to(DEVICE)
    shared = make(dice, is_coded, 2 * shared_n, k), make(dice, is_coded, k, shared_n)
    routed = make(dice, is_coded, EXPERTS, 2 * n, k), make(dice, is_coded, EXPERTS, k, n)
    logits = torch.randn(tokens, EXPERTS, generator=dice).to(DEVICE)
    chosen = choose_experts(logits, Routing(torch.zeros(EXPERTS, device=DEVICE), 1, 1, TOPK, 2.5))
    h = reference.rms_norm(x, gain, 1e-6)
    right = x + reference.expert_mlp(h, chosen[0].long(), chosen[1], *routed) + reference.gated_mlp(h, *shared)
    hidden = run_gate_up(h, None, shared[0], chosen[0], routed[0], UP)
    found = run_down(x, hidden, shared[1], chosen, routed[1], DOWN)
    torch.testing.assert_close(found, right, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(run_gate_up(h, None, shared[0], chosen[0], routed[0]), hidden, atol=1e-5, rtol=1e-5)
    alone = run_down(x, run_gate_up(h, None, shared[0], config=UP), shared[1], config=DOWN)
    torch.testing.assert_close(alone, x + reference.gated_mlp(h, *shared), atol=1e-4, rtol=1e-4)
    if tokens > GEMV_TOKENS:
        return
    squares = x.square().unflatten(1, (2, -1)).sum(2)
    up = UP._replace(together=1)
    hidden = run_gate_up(PreparedResidual(x, x * gain, squares), Norm(gain, 1e-6), shared[0], chosen[0], routed[0], up)
    stream = run_down_into(x, hidden, shared[1], chosen, routed[1], Norm(gain, 1e-6))
    torch.testing.assert_close(stream.x, right, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(stream.scaled, right * gain, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(stream.squares.sum(1), right.square().sum(1), atol=1e-2, rtol=1e-4)


LIMIT = 0.4  # of gates, which are about 1


@pytest.mark.parametrize("tokens", [1, 3])
def test_gates_are_clamped(tokens: int) -> None:
    """By every kernel that has them: those of few tokens, of sorted pairs, of 4-bit codes, and in front of down."""
    dice, k, n = torch.Generator().manual_seed(0), 128, 64
    x = torch.randn(tokens, k, generator=dice).to(DEVICE)
    shared, routed = make(dice, False, 2 * n, k), make(dice, False, EXPERTS, 2 * n, k)
    form = "e2m1 * weight_scale * weight_scale_2 F8_E4M3 out,in/16"
    packed, coded_down = encoded(form, n, k, 2, EXPERTS), encoded(form, k, n, 1, EXPERTS)
    down = make(dice, False, EXPERTS, k, n)
    logits = torch.randn(tokens, EXPERTS, generator=dice).to(DEVICE)
    ids, weights = choose_experts(logits, Routing(torch.zeros(EXPERTS, device=DEVICE), 1, 1, TOPK, 2.5))
    gates = reference.linear(x, shared)
    x[-1, 3] = torch.nan  # stays what it is
    hidden = run_gate_up(x, None, shared, ids, routed, limits=(LIMIT, 2 * LIMIT))
    mine = reference.silu_and_mul(reference.linear(x, shared), LIMIT)
    theirs = [
        reference.silu_and_mul(x[t] @ reference.decode(routed)[ids[t].long()].mT, 2 * LIMIT) for t in range(tokens)
    ]
    torch.testing.assert_close(hidden, torch.cat([torch.stack(theirs).flatten(1), mine], 1), equal_nan=True)
    written = write_activations(gates, gated=True, limit=LIMIT, fp32=True).fp32
    torch.testing.assert_close(written, reference.silu_and_mul(gates, LIMIT))
    for run, pair, bound in (
        (grouped_gemm.expert_mlp, (routed, down), 2e-2), (grouped_gemm.expert_mlp, (packed, coded_down), 1e-4),
        (packed_experts, (packed, coded_down), 1e-4),
    ):  # fmt: skip
        right, free = (reference.expert_mlp(x, ids.long(), weights, *pair, limit) for limit in (LIMIT, inf))
        assert not torch.allclose(right, free, rtol=0.1, atol=0.1)
        found = run(x, ids, weights, *pair, limit=LIMIT)
        torch.testing.assert_close(found, right, rtol=bound, atol=bound, equal_nan=True)


@pytest.mark.parametrize("tokens", [1, 2])
def test_down_of_few_tokens_with_many_units_and_rows(tokens: int) -> None:
    """More than a chunk of units, and more rows than share a scale."""
    dice, k, n = torch.Generator().manual_seed(0), 136, 640
    shared, routed = make(dice, True, k, n), make(dice, True, EXPERTS, k, n)
    x, hidden = (torch.randn(tokens, size, generator=dice).to(DEVICE) for size in (k, 3 * n))
    chosen = torch.tensor([[2, 0], [1, 3]][:tokens], dtype=torch.int32, device=DEVICE), torch.rand(tokens, 2).to(DEVICE)
    stream = run_down_into(x, hidden, shared, chosen, routed, Norm(torch.ones(k, device=DEVICE), 1e-6))
    units, weights = hidden.unflatten(1, (3, n)), torch.cat([chosen[1], torch.ones(tokens, 1, device=DEVICE)], 1)
    down = torch.cat([reference.decode(routed)[chosen[0].long()], reference.decode(shared).expand(tokens, 1, k, n)], 1)
    right = x + (weights[..., None] * torch.einsum("tekn,ten->tek", down, units)).sum(1)
    torch.testing.assert_close(stream.x, right, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("n", "units", "right"), [(640, 16, True), (40, 32, True), (200, 16, False), (126, 4, False)])
def test_a_program_s_units_share_their_scales(n: int, units: int, right: bool) -> None:
    """Rows of `up` begin behind the gate's, wherever that is in a block."""
    assert shares_scales(n, units) == right
    if not right:
        matrix = make(torch.Generator(), True, 2 * n, 64)
        with pytest.raises(AssertionError, match=f"{n} units: a program has several scales"):
            run_gate_up(torch.zeros(1, 64, device=DEVICE), None, matrix, config=GateUpConfig(units, 64, 1))


@pytest.mark.parametrize(("tokens", "hidden"), [(1, 700), (2, 2500), (3, 2500)])
def test_a_step_begins_with_rows_of_the_embedding(tokens: int, hidden: int) -> None:
    dice = torch.Generator().manual_seed(0)
    embedding, gain = torch.randn(5, hidden, generator=dice).bfloat16().to(DEVICE), torch.rand(hidden).to(DEVICE)
    turns, ids = torch.randn(9, 2, 8, generator=dice).to(DEVICE), torch.tensor([3, 1, 4][:tokens]).to(DEVICE)
    x, rotation = embed_with_angles(ids, ids + 2, embedding, turns, Norm(gain, 1e-6))
    assert torch.equal(get_values(x), embedding[ids].float()) and isinstance(x, PreparedResidual) == (
        tokens <= GEMV_TOKENS
    )
    assert torch.equal(torch.stack(rotation, 1), turns[ids + 2])
    share, _ = embed_with_angles(ids, ids + 2, embedding[2:4], turns, Norm(gain, 1e-6), first=2)
    others = (ids < 2) | (ids >= 4)  # tokens of other ranks
    assert torch.equal(get_values(share), embedding[ids].float().masked_fill(others[:, None], 0))
    if isinstance(x, PreparedResidual):
        assert torch.equal(x.scaled, x.x * gain)
        torch.testing.assert_close(x.squares.sum(1), x.x.square().sum(1))
