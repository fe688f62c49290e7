"""Experts that other ranks hold, whose id is -1: kernels add nothing for them, whatever lies where they would be."""

import pytest
import torch
from torch import Tensor

from saccade.kernels import reference
from saccade.kernels.moe.down import run_down, run_down_into
from saccade.kernels.moe.gate_up import run_gate_up
from saccade.kernels.moe.grouped_gemm import expert_mlp
from saccade.kernels.moe.packed import packed_experts
from saccade.kernels.residual import PreparedResidual
from saccade.kernels.types import Matrix, Norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HIDDEN, N, TOPK = 128, 128, 3
# Of some tokens no expert is here, of some all.
IDS = torch.tensor([[-1, 1, -1], [-1, -1, -1], [0, 2, 1], [2, -1, 0]], dtype=torch.int32)


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def make_matrix(seed: int, *shape: int) -> Matrix:
    scale = torch.rand(*shape[:-2], shape[-2] // 128, shape[-1] // 128, generator=torch.Generator().manual_seed(seed))
    return Matrix(draw(*shape, seed=seed).to(torch.float8_e4m3fn), (0.1 * scale + 0.02).to(DEVICE))


GATE_UP, DOWN = make_matrix(1, 3, 2 * N, HIDDEN), make_matrix(2, 3, HIDDEN, N)
SHARED = make_matrix(3, 2 * N, HIDDEN), make_matrix(4, HIDDEN, N)


def draw_tokens(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    weights = draw(tokens, TOPK, seed=6).abs()
    ids = IDS.repeat(5, 1)[:tokens].to(DEVICE)
    return draw(tokens, HIDDEN, seed=5), ids, torch.where(ids < 0, 0.0, weights)


def mix(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Matrix = GATE_UP, down: Matrix = DOWN) -> Tensor:
    """The sum over the experts that are here, one by one."""
    total = torch.zeros_like(x)
    for token, (row, its) in enumerate(zip(ids.tolist(), weights, strict=True)):
        for expert, weight in zip(row, its, strict=True):
            if expert >= 0:
                first, last = (reference.decode(w).float()[expert] for w in (gate_up, down))
                gate, up = (first @ x[token]).chunk(2)
                total[token] += weight * (last @ (gate * gate.sigmoid() * up))
    return total


@pytest.mark.parametrize("tokens", [1, 4, 9])
def test_few_tokens(tokens: int) -> None:
    x, ids, weights = draw_tokens(tokens)
    right = x + mix(x, ids, weights) + reference.gated_mlp(x, *SHARED)
    hidden = run_gate_up(x, None, SHARED[0], ids, GATE_UP, others=True)
    hidden[:, : TOPK * N].unflatten(1, (TOPK, N))[ids < 0] = torch.nan  # what nobody wrote
    found = run_down(x, hidden, SHARED[1], (ids, weights), DOWN, others=True)
    torch.testing.assert_close(found, right, atol=1e-3, rtol=1e-4)
    if tokens <= 2:
        gain = torch.ones(HIDDEN, device=DEVICE)
        stream = run_down_into(x, hidden, SHARED[1], (ids, weights), DOWN, Norm(gain, 1e-6), others=True)
        torch.testing.assert_close(stream.x, right, atol=1e-3, rtol=1e-4)


def test_two_tokens_that_are_normalised_on_the_way() -> None:
    x, ids, weights = draw_tokens(2)
    norm = Norm(torch.rand(HIDDEN, device=DEVICE) + 0.5, 1e-6)
    prepared = PreparedResidual(x, x * norm.weight, x.square().sum(1, keepdim=True))
    hidden = run_gate_up(prepared, norm, SHARED[0], ids, GATE_UP, others=True)
    h = reference.rms_norm(x, *norm)
    whole = run_gate_up(h, None, SHARED[0], ids.clamp(min=0), GATE_UP)
    here = torch.cat([(ids >= 0).repeat_interleave(N, 1), torch.ones(2, N, dtype=torch.bool, device=DEVICE)], 1)
    torch.testing.assert_close(hidden[here], whole[here], atol=1e-4, rtol=1e-4)


def test_many_tokens() -> None:
    x, ids, weights = draw_tokens(20)
    found = expert_mlp(x, ids.long(), weights, GATE_UP, DOWN)
    torch.testing.assert_close(found, mix(x, ids, weights), atol=2e-3, rtol=1e-3)
    assert not expert_mlp(x, torch.full_like(ids, -1).long(), weights, GATE_UP, DOWN).any()


def test_four_bit_codes() -> None:
    def pack(seed: int, *shape: int) -> Matrix:
        dice = torch.Generator().manual_seed(seed)
        codes = torch.randint(0, 256, (*shape[:-1], shape[-1] // 2), generator=dice, dtype=torch.uint8)
        scale = torch.rand(*shape[:-1], shape[-1] // 32, generator=dice) * 0.05 + 0.01
        return Matrix(codes.to(DEVICE), scale.to(DEVICE), (1, 32), "int4")

    x, ids, weights = draw_tokens(4)
    gate_up, down = pack(1, 3, 2 * N, HIDDEN), pack(2, 3, HIDDEN, N)
    found = packed_experts(x, ids.long(), weights, gate_up, down, others=True)
    torch.testing.assert_close(found, mix(x, ids, weights, gate_up, down), atol=1e-3, rtol=1e-3)
