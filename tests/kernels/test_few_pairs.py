"""Experts of some tens of tokens: eight pairs a tile, high and low numbers as columns of one product."""

from typing import Any

import pytest
import torch
from products import blocks, draw, draw_choice, error
from torch import Tensor

from saccade.kernels import reference
from saccade.kernels.activations import Split, prepare_activations
from saccade.kernels.moe import few_pairs, grouped_gemm
from saccade.kernels.moe.few_pairs import FEW_DOWN, FEW_PAIRS, MEAN_PAIRS, FewConfig, add_few_pairs
from saccade.kernels.moe.grouped_gemm import add_experts, find_expert_formats
from saccade.kernels.residual import get_values
from saccade.kernels.types import Matrix, Mlp, Norm, Routing
from saccade.ops.gpu import Gpu
from saccade.ops.interface import Moe, Residual
from saccade.ops.reference import Reference

SHAPES = [  # tokens, experts, topk, hidden, inner: rows that fill no tile of rows, columns that fill no step
    (20, 8, 2, 256, 128),
    (33, 16, 2, 272, 192),
    (9, 16, 3, 688, 64),
    (12, 6, 1, 384, 320),
]


def make(experts: int, hidden: int, inner: int, device: str) -> tuple[Matrix, Matrix]:
    return stack(experts, 2 * inner, hidden, device), stack(experts, hidden, inner, device)


def stack(experts: int, rows: int, columns: int, device: str) -> Matrix:
    codes, scales = zip(
        *((w.data, w.scale) for w in (blocks(rows, columns, seed) for seed in range(experts))), strict=True
    )
    return Matrix(torch.stack(codes).to(device), torch.stack(scales).to(device))


def widened(w: Matrix) -> Matrix:
    return Matrix(reference.decode(w).double())


def check_few_pairs(
    tokens: int, experts: int, topk: int, hidden: int, inner: int, device: str, *how: FewConfig
) -> None:
    up, down = make(experts, hidden, inner, device)
    x, base = draw(tokens, hidden).to(device), draw(tokens, hidden, seed=8).to(device)
    ids, weights = (t.to(device) for t in draw_choice(tokens, experts, topk))
    ids[0], ids[-1, -1] = -1, -1  # others' experts
    right = reference.expert_mlp(x.double(), ids, weights.double(), widened(up), widened(down)) + base
    shared = Matrix(up.data[1], up.scale[1]), Matrix(down.data[2], down.scale[2])  # type: ignore[index]
    x[1, 5] = torch.nan  # stays with its token
    written = prepare_activations(x, find_expert_formats(up, down)).fp16
    bound = 1e-6 if device == "cpu" else 4e-6  # sums of 128 columns in tensor cores: 2.4e-6 of 7,168 on an H200
    run: dict[str, Any] = {"how": how} if how else {}
    found = add_few_pairs(written, base, ids.int(), weights, up, down, **run)
    others = torch.arange(tokens, device=device) != 1
    assert found[1].isnan().all() and error(found[others], right[others]) < bound
    assert torch.equal(found[0], base[0])
    if device == "cuda":
        again = [add_few_pairs(written, base, ids.int(), weights, up, down, **run)[others] for _ in range(3)]
        assert all(found[others].equal(each) for each in again)
    beside = add_few_pairs(written, base, ids.int(), weights, up, down, shared=Mlp(*shared), **run)
    own = reference.gated_mlp(x[others].double(), *map(widened, shared))
    assert beside[1].isnan().all() and error(beside[others], right[others] + own) < bound
    without = add_few_pairs(written, None, ids.int(), weights, up, down, **run)
    torch.testing.assert_close(without[others] + base[others], found[others])


@pytest.mark.parametrize("shape", SHAPES)
def test_few_pairs_equal_the_reference(shape: tuple[int, ...]) -> None:
    check_few_pairs(*shape, "cpu")  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*SHAPES, (64, 256, 8, 1024, 256), (128, 32, 1, 7168, 256)])
def test_few_pairs_equal_the_reference_on_a_gpu(shape: tuple[int, ...]) -> None:
    check_few_pairs(*shape, "cuda")  # type: ignore[arg-type]


@pytest.mark.parametrize("each", [1, 2, 8])
def test_tiles_of_rows_that_a_program_goes_through(each: int) -> None:
    """One, some, and more than there are."""
    check_few_pairs(*SHAPES[3], "cpu", FewConfig(rows=32), FEW_DOWN._replace(each=each))


def test_an_expert_with_more_pairs_than_a_tile_has() -> None:
    """And others with none."""
    up, down = make(6, 256, 64, "cpu")
    x, weights = draw(3 * FEW_PAIRS, 256), torch.rand(3 * FEW_PAIRS, 1)
    ids = torch.full((3 * FEW_PAIRS, 1), 4)
    written = prepare_activations(x, find_expert_formats(up, down)).fp16
    found = add_few_pairs(written, None, ids.int(), weights, up, down)
    assert error(found, reference.expert_mlp(x.double(), ids, weights.double(), widened(up), widened(down))) < 1e-6


@pytest.mark.parametrize("tokens", [33, 70])
def test_a_shared_expert_of_the_same_size_is_multiplied_beside(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On both sides of SPLIT_TOKENS; and by products of its own where it is larger, or in other numbers."""
    taken: list[bool] = []

    def note(*args: Any, **others: Any) -> Tensor:
        taken.append((args[7:8] or (None,))[0] is not None)
        return add_few_pairs(*args, **others)

    for place in (grouped_gemm, few_pairs):
        monkeypatch.setattr(place, "add_few_pairs", note)
    (up, down), x, norm = make(20, 256, 64, "cpu"), draw(tokens, 256), Norm(torch.rand(256) + 0.5, 1e-6)
    routing = Routing(torch.zeros(20), 1, 1, 1, 2.5)
    router = Matrix(draw(20, 256, seed=4, spread=0.05).bfloat16())
    same, larger = (
        [Matrix(w.data[0], w.scale[0]) for w in (stack(1, 2 * n, 256, "cpu"), stack(1, 256, n, "cpu"))]  # type: ignore[index]
        for n in (64, 128)
    )
    for shared, bound in (
        (same, 1e-6),
        (larger, 1e-6),
        ([Matrix(reference.decode(w).bfloat16()) for w in same], 2e-5),  # whose inputs keep 16 bits
    ):
        mlp = Mlp(*shared, 3.0)
        moe = Moe(router, routing, mlp, up, down, 2.0)
        found = [run(ops, x, norm, moe) for ops in (Gpu(), Reference())]
        assert error(found[0], found[1].double()) < bound
    assert taken == [True, False, False]


def run(ops: Any, x: Tensor, norm: Norm, moe: Moe) -> Tensor:
    residual = Residual(x, norm)
    return get_values(ops.add_experts(residual, norm, ops.route(residual, norm, moe), moe, norm).value)


def test_where_an_expert_has_few_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """On both sides of MEAN_PAIRS, and never for inputs in 11 bits, for weights of another kind, or for an odd width."""
    taken: list[int] = []

    def note(x: Split, base: Tensor | None, experts: Tensor, *rest: Any) -> Tensor:
        taken.append(experts.numel())
        return few_pairs.add_few_pairs(x, base, experts, *rest)

    monkeypatch.setattr(grouped_gemm, "add_few_pairs", note)
    (up, down), odd = make(3, 256, 128, "cpu"), make(3, 256, 80, "cpu")
    bf16 = tuple(Matrix(reference.decode(w).bfloat16()) for w in (up, down))
    assert MEAN_PAIRS * 3 == 12
    for tokens, pair, activations in (
        (12, (up, down), "exact"), (13, (up, down), "exact"), (11, (up, down), "bf16"), (11, bf16, "exact"),
        (11, odd, "exact"),
    ):  # fmt: skip
        ids, weights = draw_choice(tokens, 3, 1)
        add_experts(draw(tokens, 256), None, ids.int(), weights, *pair, activations=activations)
    assert taken == [12]
