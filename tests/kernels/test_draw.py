"""Tokens that the kernel draws are those of `choose_tokens`, for every option, across borders of tiles and of sorts."""

import math
from random import Random

import pytest
import torch

from saccade.engine.sample import Row, choose_tokens, draw_uniform, list_columns
from saccade.kernels import draw

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPTIONS = [
    {}, {"top_p": 0.95}, {"top_p": 0.05}, {"top_k": 1}, {"top_k": 2**40}, {"min_p": 0.02}, {"min_p": 1.0},
    {"top_k": 140, "top_p": 0.99, "min_p": 1e-4}, {"top_p": 0.6, "min_p": 0.2},
]  # fmt: skip


def make_rows(count: int, seed: int) -> list[Row]:
    dice = Random(seed)
    hot = [(dice.choice((0.3, 1.0, 3.0, 100.0)), dice.choice(OPTIONS)) for _ in range(count)]
    return [Row(temperature=t, uniform=draw_uniform(seed, i), **o) for i, (t, o) in enumerate(hot)]  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 128 weights, sorts of three rows of 777."""
    monkeypatch.setattr(draw, "TILE", 128)
    monkeypatch.setattr(draw, "SORTED", 3 * 777)


@pytest.mark.parametrize("vocab", [5, 128, 777])
@pytest.mark.parametrize("has_ties", [False, True])
def test_drawn_tokens_are_those_of_plain_torch(vocab: int, has_ties: bool) -> None:
    for seed in range(9):
        logits = torch.randn(8, vocab, generator=torch.Generator().manual_seed(seed)) * 3
        logits = ((logits * 2).round() / 2 if has_ties else logits).to(DEVICE)
        columns = list_columns(make_rows(9, seed), 9).to(DEVICE)[:, 1:]  # as a part of more rows
        assert draw.draw_tokens(logits, columns).tolist() == choose_tokens(logits, columns).tolist()


def test_the_ends_of_the_unit_interval_draw_the_first_and_the_last_kept_token() -> None:
    """Also where the kept tokens end at the border of a tile, and where all weigh alike."""
    rows = [Row(temperature=1.0, top_k=k, uniform=u) for k in (127, 128, 129, 0) for u in (0.0, 1 - 2**-53)]
    columns, logits = list_columns(rows, 8).to(DEVICE), torch.zeros(8, 300, device=DEVICE)
    assert draw.draw_tokens(logits, columns).tolist() == [0, 126, 0, 127, 0, 128, 0, 299]
    half = list_columns([Row(temperature=1.0, uniform=0.5)], 1).to(DEVICE)  # is where a tile ends: the next one's first
    assert draw.draw_tokens(logits[:1, :256].contiguous(), half).tolist() == [128]


def test_tokens_that_reach_top_p_exactly_are_enough() -> None:
    rows = [Row(temperature=1.0, top_p=0.5, uniform=u) for u in (0.5 - 2**-53, 0.5, 1 - 2**-53)]
    assert draw.draw_tokens(torch.zeros(3, 4, device=DEVICE), list_columns(rows, 3).to(DEVICE)).tolist() == [0, 1, 1]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_draws_a_token_of_the_vocabulary(bad: float) -> None:
    """An embedding is looked up by it. Banned tokens are minus infinity, and are never drawn beside others."""
    logits = torch.randn(6, 200, generator=torch.Generator().manual_seed(1))
    logits[:3, 50:] = bad
    logits[3] = bad
    columns = list_columns([Row(temperature=1.0, uniform=draw_uniform(2, i)) for i in range(6)], 6).to(DEVICE)
    found = draw.draw_tokens(logits.to(DEVICE), columns)
    assert bool(((found >= 0) & (found < 200)).all()) and (bad != -math.inf or bool((found[:3] < 50).all()))
    assert found[4:].tolist() == choose_tokens(logits.to(DEVICE), columns)[4:].tolist()


def test_a_row_draws_the_same_whatever_stands_beside_it() -> None:
    logits = torch.randn(7, 777, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    columns = list_columns(make_rows(7, 4), 7).to(DEVICE)
    together = draw.draw_tokens(logits, columns).tolist()
    assert together == [int(draw.draw_tokens(logits[i : i + 1], columns[:, i : i + 1])) for i in range(7)]
