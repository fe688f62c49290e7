"""Kimi delta attention on a CUDA device, at the shapes of GLM-5.3-Flash: fp64's numbers, repeated bits, CUDA graphs."""

import pytest
import torch
from recurrent_cases import Run, compare_steps, draw_inputs, find_where, make_layer, make_states

from saccade.kernels import reference as plain
from saccade.kernels.recurrent.recur import run_recurrence

BOUND = 1e-4  # below the 1e-3 that is asked for; the interpreter gives 1e-5
# Prompts of any length beside decodes, drafts of which some are taken back, chunks behind what is pending.
STEPS: list[list[Run]] = [
    [(1, 0, 300), (2, 0, 1), (3, 0, 65)], [(1, 300, 1), (2, 1, 1), (3, 65, 1)], [(1, 301, 6), (2, 2, 6), (3, 66, 6)],
    [(1, 303, 6), (2, 8, 6), (3, 67, 6)], [(2, 10, 130), (3, 70, 3), (1, 304, 1)],
]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [64, 16, 8])
@pytest.mark.parametrize("shift", [0.0, -30.0, 30.0])
def test_steps_of_a_rank(heads: int, shift: float) -> None:
    torch.manual_seed(0)
    worst = compare_steps(make_layer(heads, 128, dtype=torch.bfloat16, shift=shift, device="cuda"), STEPS)
    print(f"{heads} heads, shift {shift}: {worst:.1e}")
    assert worst < BOUND


@pytest.mark.gpu
@pytest.mark.parametrize("requests", [1, 8, 256])
def test_a_decode_in_a_graph_gives_the_same_bits_again(requests: int) -> None:
    """Without a number that is read back: a capture would fail. Positions and places are read by each replay."""
    torch.manual_seed(0)
    layer = make_layer(8, 128, dtype=torch.bfloat16, device="cuda")
    state = make_states(layer, requests + 1)
    where = find_where([(place, 0, 1) for place in range(1, requests + 1)], 0, "cuda")
    inputs = draw_inputs(layer, requests)

    def run() -> torch.Tensor:
        return run_recurrence(*inputs, *layer[1:3], layer.delta, layer.norm, state, where, plain.linear)

    expected = []
    for position in range(12):  # longer than the ring
        where.positions.fill_(position)
        expected.append(run().clone())
    for part in state:
        part.zero_()
    where.positions.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    for part in state:
        part.zero_()
    for position in range(12):
        where.positions.fill_(position)
        graph.replay()
        assert torch.equal(found, expected[position]), position


@pytest.mark.gpu
def test_repeated_prompts_have_the_same_bits() -> None:
    torch.manual_seed(0)
    layer = make_layer(8, 128, dtype=torch.bfloat16, device="cuda")
    where, inputs = find_where([(1, 0, 1000), (2, 0, 500), (3, 0, 2)], 0, "cuda"), draw_inputs(layer, 1502)
    results = []
    for _ in range(3):
        state = make_states(layer, 4)
        args = (*inputs, *layer[1:3], layer.delta, layer.norm, state, where, plain.linear)
        results.append([run_recurrence(*args), *state])
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
