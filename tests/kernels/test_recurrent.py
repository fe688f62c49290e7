"""Kimi delta attention by kernels: what fp64 gives, token by token, wherever steps, chunks and drafts begin and end."""

from collections.abc import Iterator
from functools import partial
from random import Random

import pytest
import torch
from recurrent_cases import TAKEN_BACK, Layer, Run, compare_steps, draw_inputs, find_where, make_states
from recurrent_cases import make_layer as make_layer_on

from saccade.kernels import reference as plain
from saccade.kernels.recurrent import recur
from saccade.kernels.recurrent.recur import run_recurrence
from saccade.kernels.recurrent.terms import LEAST_BOUND

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
make_layer = partial(make_layer_on, device=DEVICE)
BOUND = 5e-5  # with 16 bits of each factor; found: up to 1e-5
# A prompt and decodes; three tokens of which two are taken back; tokens of no request; a ring that begins anew.
FEW: list[list[Run]] = [[(1, 0, 7), (2, 0, 1)], [(1, 7, 3), (2, 1, 1)], [(1, 8, 2), (0, 0, 1), (2, 2, 1)], [(2, 3, 1)]]
# A short request beside a long one, whose chunk ends behind a border; pending tokens in front of a whole chunk, of which
# one is taken back.
MANY: list[list[Run]] = [[(2, 0, 3), (1, 0, 65)], [(2, 2, 64), (1, 65, 1)]]


@pytest.fixture(autouse=True)
def same_numbers() -> Iterator[None]:
    """And memory that holds NaN until it is written; not on a GPU, where that mode refuses products."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(DEVICE == "cpu")
    yield
    torch.use_deterministic_algorithms(False)


def test_few_tokens_of_several_requests() -> None:
    assert compare_steps(make_layer(2, 16, dtype=torch.bfloat16), FEW) < BOUND


def test_heads_of_any_width_are_shared_by_programs() -> None:
    """24 columns are two programs of 16; the ring of a convolution of 6 has 11 tokens."""
    assert compare_steps(make_layer(1, 24, width=6), [[(1, 0, 5)], [(1, 3, 2)]]) < BOUND


def test_chunks_begin_and_end_anywhere() -> None:
    assert compare_steps(make_layer(1, 16), MANY) < BOUND


@pytest.mark.soak
def test_any_steps() -> None:
    """Requests that go on by any numbers of tokens, of which they keep all, or take some back if they were few."""
    for seed in range(30):
        dice, steps, kept = Random(seed), list[list[Run]](), {1: 0, 2: 0, 3: 0}
        for _ in range(4):
            steps.append([])
            for place in dice.sample(sorted(kept), 2):
                count = dice.choice([1, 1, 2, 3, 4, 6, 7, 63, 64, 65, 130])
                steps[-1].append((place, kept[place], count))
                kept[place] += count if count > TAKEN_BACK else dice.randint(1, count)
        torch.manual_seed(seed)
        layer = make_layer(dice.choice([1, 2]), dice.choice([16, 20, 32]), dice.choice([3, 4, 6]))
        assert compare_steps(layer, steps) < BOUND, (seed, steps)


@pytest.mark.parametrize(
    ("shift", "bound"), [(-30.0, -5.0), (30.0, -5.0), (30.0, LEAST_BOUND)], ids=["none", "published", "strongest"]
)
def test_decays_at_the_ends_of_their_range(shift: float, bound: float) -> None:
    """None, exp(-5) a token, and the strongest that chunks take."""
    layer = make_layer(1, 24, width=3, shift=shift, bound=bound)
    assert recur.can_be_chunked(layer.delta)
    assert compare_steps(layer, [[(1, 0, 70)]]) < BOUND


def test_keys_that_are_all_alike() -> None:
    """Tokens then cancel what those before them have added: 1e-4 is left, where powers of their products, a usual way
    to such an inverse, reach 1e18."""
    assert compare_steps(make_layer(1, 16, shift=-30.0), [[(1, 0, 70)]], are_alike=True) < 5e-4


def run_step(layer: Layer, runs: list[Run]) -> torch.Tensor:
    torch.manual_seed(1)
    where, state = find_where(runs, 0, DEVICE), make_states(layer, 2)
    inputs = draw_inputs(layer, len(where.positions))
    return run_recurrence(*inputs, layer.f_b, layer.g_b, layer.delta, layer.norm, state, where, plain.linear)


def test_what_a_kernel_does_not_take_another_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices that are codes are multiplied elsewhere; decays that chunks do not take run token by token."""
    layer, runs = make_layer(1, 16), [(1, 0, 9)]
    expected = run_step(layer, runs)
    monkeypatch.setattr(recur, "has_gates", lambda *matrices: False)
    torch.testing.assert_close(run_step(layer, runs), expected)
    monkeypatch.setattr(recur, "FEW_TOKENS", 1)
    strong = layer._replace(delta=layer.delta._replace(lower_bound=-50.0))
    assert not recur.can_be_chunked(strong.delta) and recur.can_be_chunked(layer.delta)
    assert compare_steps(strong, [runs]) < BOUND
