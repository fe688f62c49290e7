"""The selection of prompts by hand for a Hopper against the reference and against the kernel that runs everywhere."""

import pytest
import torch
from torch import Tensor

from saccade.kernels import reference
from saccade.kernels.indexer.select import SELECT_SEVERAL, select
from saccade.kernels.indexer.select_hopper import (
    BY_LENGTH,
    LEAST_LOGITS,
    RowConfig,
    are_selected_by_hand,
    select_by_hand,
)

TOKENS = 300


def draw(kind: str, context: int) -> Tensor:
    x = torch.randn(TOKENS, context, device="cuda")
    if kind == "zeros":  # relu makes many exact zeros
        return x.clamp_min(0.0) * (torch.rand(TOKENS, 1, device="cuda") > 0.3)
    if kind == "ties":
        return (x * 3).round()
    if kind == "skewed":
        return (x * 6).exp() - 1e-3
    return x


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["normal", "zeros", "ties", "skewed"])
@pytest.mark.parametrize(
    ("context", "k"),
    [(64, 16), (512, 2048), (2048, 2048), (4096, 2048), (8192, 2048), (10048, 2048), (32768, 2048), (32832, 2048),
     (98304, 2048), (163840, 2048), (40960, 16384)],
)  # fmt: skip
def test_selections_by_hand(context: int, k: int, kind: str) -> None:
    """Positions from the first to the last, around each border; the bits of the reference, twice."""
    torch.manual_seed(context)
    logits = draw(kind, context)
    ends = [0, 1, 15, 2047, 2048, 8191, 8192, 32767, 32768, 65535, context - 1]
    positions = torch.randint(0, context, (TOKENS,), device="cuda")
    positions[: len(ends)] = torch.tensor(ends, device="cuda").clamp(max=context - 1)
    hidden = torch.arange(context, device="cuda") > positions[:, None]
    wanted = reference.select(logits.masked_fill(hidden, float("-inf")), positions, k)
    assert are_selected_by_hand(logits, k) == (context > LEAST_LOGITS)
    hides = logits.masked_fill(hidden, float("nan"))  # what follows a token makes no difference
    for how in (None, *BY_LENGTH.values(), RowConfig(spans=4, warps=16)):
        assert select_by_hand(hides, positions, min(k, context), how).equal(wanted.to(torch.int32))
    found = select(logits, positions, k)
    assert found.equal(wanted.to(torch.int32))
    if 2 * k <= SELECT_SEVERAL.block:
        assert select(logits, positions, k, SELECT_SEVERAL).equal(found)


@pytest.mark.gpu
@pytest.mark.parametrize("context", [4096, 32768, 70016])
@pytest.mark.parametrize("wrong", ["nan", "inf", "-inf"])
def test_numbers_that_are_not_finite(wrong: str, context: int) -> None:
    """A NaN or an infinity leaves nothing but -1, wherever it stands; what nobody sees does not."""
    logits = torch.randn(TOKENS, context, device="cuda")
    positions = torch.full((TOKENS,), context - 2, device="cuda")
    places = torch.linspace(0, context - 1, TOKENS, device="cuda").long()
    logits[torch.arange(TOKENS), places] = float(wrong)
    found = select(logits, positions, 2048)
    is_seen = (places <= context - 2) & (wrong != "-inf")
    assert (found[is_seen] == -1).all() and (found[~is_seen] >= 0).all()
    assert found.equal(select(logits, positions, 2048, SELECT_SEVERAL))
