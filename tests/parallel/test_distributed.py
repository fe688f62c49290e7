"""Sums, gathers and broadcasts of ranks: in rank order, and the same bits on every rank."""

import pytest
import rank_cases
import torch
from rank_pool import RankPool

from saccade.models.parameters import share
from saccade.parallel.distributed import LARGE_MESSAGE
from saccade.parallel.ranks import ONE_RANK


@pytest.mark.parametrize(("tp", "shape"), [(2, (1, 7)), (3, (2, 5)), (3, (3, 31_001)), (2, (40, 1024)), (4, (0, 8))])
def test_the_sum_is_in_rank_order(ranks: RankPool, tp: int, shape: tuple[int, int]) -> None:
    dice = torch.Generator().manual_seed(0)
    # Of such numbers every order has another sum.
    parts = [
        torch.randn(shape, generator=dice) * 10.0 ** float(torch.randint(-3, 4, (), generator=dice)) for _ in range(tp)
    ]
    expected = parts[0]
    for part in parts[1:]:
        expected = expected + part
    found = ranks.run(rank_cases.add_up, tp, 1, parts)
    assert all(total.equal(expected) for total, _ in found)
    size = expected.nbytes
    if tp > 2 and size >= LARGE_MESSAGE:
        assert all(sent < (tp - 1) * size for _, sent in found)
    else:
        assert all(sent == (tp - 1) * size for _, sent in found)


@pytest.mark.parametrize(("tp", "width"), [(2, 9), (3, 10), (3, 2)])
def test_shares_that_differ_are_gathered(ranks: RankPool, tp: int, width: int) -> None:
    whole = torch.randn(3, width, generator=torch.Generator().manual_seed(0))
    parts = [whole[:, slice(*share(width, tp, rank))] for rank in range(tp)]
    assert all(found.equal(whole) for found in ranks.run(rank_cases.gather, tp, 1, parts, width))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.uint8])
def test_broadcasts_bring_every_bit(ranks: RankPool, dtype: torch.dtype) -> None:
    tensor = torch.arange(24, dtype=torch.uint8).view(2, 12).view(dtype)
    for held, texts in ranks.run(rank_cases.pass_on, 3, 1, tensor, "é"):
        assert held.view(torch.uint8).equal(tensor.view(torch.uint8)) and texts == ["", "é", "éé"]


def test_one_rank_does_nothing() -> None:
    part = torch.randn(2, 3)
    assert ONE_RANK.add_up(part) is part and ONE_RANK.gather(part, 3) is part and ONE_RANK.collect("x") == ["x"]
