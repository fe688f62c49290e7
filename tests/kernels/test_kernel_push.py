"""The one-shot sum over memory that ranks share: here they are tensors of one process, and take their turns."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from saccade.kernels.collective.push import (
    PUSH_BLOCK,
    Peers,
    Phases,
    count_blocks,
    count_shared_words,
    push_columns,
    push_sum,
)
from saccade.kernels.reference import rms_norm
from saccade.kernels.residual import PreparedResidual
from saccade.kernels.types import Norm
from saccade.models.parameters import share

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="one process cannot wait for itself on a GPU")


def make_peers(ranks: int, blocks: int) -> list[Peers]:
    shared = [torch.zeros(count_shared_words(ranks, blocks), dtype=torch.int32) for _ in range(ranks)]
    made = []
    for rank in range(ranks):
        told = torch.zeros(1, dtype=torch.int32)
        addresses = torch.tensor([*(s.data_ptr() for s in shared), told.data_ptr()])
        peers = Peers(rank, ranks, blocks, addresses, torch.zeros(blocks, dtype=torch.int32), torch.zeros_like(told))
        made.append(peers)
        KEPT.append((shared, told))
    return made


KEPT: list[tuple[list[Tensor], Tensor]] = []  # what lies at the addresses


def in_turns(run: Callable[[int, Phases], object], ranks: int) -> Sequence[object]:
    """Each phase on every rank, the last rank first."""
    results: list[object] = [None] * ranks
    for phases in (Phases(True, False, False), Phases(False, True, False), Phases(False, False, True)):
        for rank in reversed(range(ranks)):
            results[rank] = run(rank, phases)
    return results


def add_in_order(parts: Sequence[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


@pytest.mark.parametrize(("ranks", "steps"), [(2, 1), (3, 2), (8, 1)])
def test_sums_go_in_rank_order_whatever_came_before(ranks: int, steps: int) -> None:
    """Of many sizes after each other, so that halves and counts of the blocks differ, in one and two steps in turn."""
    peers, columns = make_peers(ranks, 6), PUSH_BLOCK + 40
    for round_, rows in enumerate((1, 3, 1) if ranks < 8 else (1, 1)):
        parts = list(torch.randn(ranks, rows, columns) * 10.0 ** torch.randint(-3, 4, (ranks, rows, 1)))
        how = 1 + (steps + round_) % 2
        found = in_turns(lambda r, p: push_sum(peers[r], parts[r], steps=how, phases=p), ranks)  # noqa: B023
        expected = add_in_order(parts)
        assert all(isinstance(f, Tensor) and f.equal(expected) for f in found)
    assert all(p.error.item() == 0 for p in peers)


def test_the_residual_is_added_and_prepared_for_the_norm_that_follows() -> None:
    peers, hidden = make_peers(3, 8), 2 * PUSH_BLOCK + 16
    norm = Norm(torch.rand(hidden) + 0.5, 1e-6)
    parts, before = list(torch.randn(3, 2, hidden)), torch.randn(2, hidden)
    expected = before + add_in_order(parts)
    for found in in_turns(lambda r, p: push_sum(peers[r], parts[r], before, norm, phases=p), 3):
        assert isinstance(found, PreparedResidual)
        assert found.x.equal(expected) and found.scaled.equal(expected * norm.weight)
        normal = found.scaled * torch.rsqrt(found.squares.sum(1, keepdim=True) / hidden + norm.eps)
        torch.testing.assert_close(normal, rms_norm(expected, *norm), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("total", [4 * PUSH_BLOCK, 7])
def test_columns_stand_side_by_side_in_rank_order(total: int) -> None:
    ranks = 3
    peers, whole = make_peers(ranks, 6), torch.randn(3, total)
    shares = [whole[:, slice(*share(total, ranks, r))].contiguous() for r in range(ranks)]
    for _ in range(2):
        found = in_turns(lambda r, p: push_columns(peers[r], shares[r], total, p), ranks)
        assert all(isinstance(f, Tensor) and f.equal(whole) for f in found)


@pytest.mark.parametrize("steps", [1, 2])
def test_a_rank_that_never_comes_is_named_and_later_sums_wait_for_nobody(steps: int) -> None:
    peers, part = make_peers(3, 4), torch.ones(1, 2 * PUSH_BLOCK)
    told = [KEPT[-3 + r][1] for r in range(3)]
    for rank in (0, 2):
        push_sum(peers[rank], part, steps=steps, phases=Phases(True, False, False))
    for rank in (0, 2):
        push_sum(peers[rank], part, steps=steps, phases=Phases(False, True, True))
        assert peers[rank].error.item() == told[rank].item() == 1 + 1
    push_sum(peers[0], part, steps=steps)
    assert peers[1].error.item() == told[1].item() == 0


def test_more_rows_than_there_is_room_for_are_refused() -> None:
    peers = make_peers(2, 4)
    assert count_blocks(2, PUSH_BLOCK + 1) == 4
    with pytest.raises(AssertionError, match="room for 4 blocks"):
        push_sum(peers[0], torch.ones(5, PUSH_BLOCK))


def test_a_rank_that_is_one_sum_ahead_spoils_nothing() -> None:
    """Rank 0 writes its part of the second sum before rank 1 has taken the first."""
    peers = make_peers(2, 4)
    parts = torch.randn(2, 2, 1, PUSH_BLOCK)  # of each sum and rank
    push, take = Phases(True, False, False), Phases(False, True, True)
    for rank in (0, 1):
        push_sum(peers[rank], parts[0, rank], phases=push)
    first = [push_sum(peers[0], parts[0, 0], phases=take)]
    push_sum(peers[0], parts[1, 0], phases=push)
    first.append(push_sum(peers[1], parts[0, 1], phases=take))
    push_sum(peers[1], parts[1, 1], phases=push)
    second = [push_sum(peers[rank], parts[1, rank], phases=take) for rank in (0, 1)]
    for found, expected in ((first, parts[0].sum(0)), (second, parts[1].sum(0))):
        assert all(isinstance(f, Tensor) and f.equal(expected) for f in found)
