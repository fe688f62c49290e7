"""A layer of Kimi delta attention with random parameters, steps of requests through it, and what they should give."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from saccade.kernels import reference as plain
from saccade.kernels.recurrent.delta import DeltaState, DeltaWeights, find_decay, run_delta
from saccade.kernels.recurrent.recur import run_recurrence
from saccade.kernels.recurrent.tokens import Where
from saccade.kernels.types import Matrix, Norm

TAKEN_BACK = 6  # tokens
PADDING = 1  # tokens behind those of all requests
Run = tuple[int, int, int]  # place of its state, first position, tokens


class Layer(NamedTuple):
    delta: DeltaWeights
    f_b: Matrix
    g_b: Matrix
    norm: Norm


def make_layer(
    heads: int, dim: int, width: int = 4, dtype: torch.dtype = torch.float32, shift: float = 0.0,
    bound: float = -5.0, device: str = "cpu",
) -> Layer:  # fmt: skip
    """`shift` is added to what decays are made of: -30 lets nothing decay, 30 all by exp(bound)."""
    n = heads * dim

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device)

    delta = DeltaWeights(draw(3 * n, width) / 2, draw(heads) / 2, draw(n) + shift, bound, heads, dim)
    f_b, g_b = (Matrix((draw(n, dim) * dim**-0.5).to(dtype)) for _ in range(2))
    return Layer(delta, f_b, g_b, Norm(draw(dim).abs() + 0.5, 1e-5))


def make_states(layer: Layer, places: int) -> DeltaState:
    d, device = layer.delta, layer.delta.conv.device
    ring = TAKEN_BACK + d.conv.shape[1] - 1
    shapes = (d.heads, d.dim, d.dim), (d.heads,), (ring, 4 * d.heads * d.dim + d.heads)
    return DeltaState(*(torch.zeros(places, *shape, device=device) for shape in shapes))


def draw_inputs(layer: Layer, tokens: int, are_alike: bool = False) -> list[Tensor]:
    """Queries with keys and values, beta, low ranks of decay and output gate: views of one product."""
    d = layer.delta
    widths = [3 * d.heads * d.dim, d.heads, d.dim, d.dim]
    both = torch.randn(tokens, sum(widths), device=d.conv.device)
    if are_alike:
        both[:] = both[0]
    return list(both.split(widths, dim=1))


def find_where(runs: Sequence[Run], padding: int, device: str = "cpu") -> Where:
    """`padding` tokens stand behind those of all requests."""
    starts = torch.tensor([0, *(count for _, _, count in runs)]).cumsum(0)
    positions = [i for _, first, count in runs for i in range(first, first + count)] + [0] * padding
    return Where(
        *(torch.tensor(x, device=device) for x in ([place for place, _, _ in runs], positions, starts.tolist()))
    )


def run_reference(
    inputs: Sequence[Tensor], layer: Layer, state: DeltaState, where: Where, dtype: torch.dtype
) -> Tensor:
    """As FlashReference.recur, in `dtype`, which is also that of `state`."""
    qkv, beta, forget, gate = (x.to(dtype) for x in inputs)
    d = layer.delta
    d = DeltaWeights(d.conv.to(dtype), d.decay.to(dtype), d.bias.to(dtype), *d[3:])
    decay = find_decay(forget @ layer.f_b.data.to(dtype).T, d).flatten(1)
    rows = torch.cat([qkv, decay, beta.sigmoid()], dim=1)
    seen = torch.zeros(len(qkv), d.heads, d.dim, dtype=dtype, device=qkv.device)
    ends = where.query_start.tolist()
    for place, first, last in zip(where.places.tolist(), ends, ends[1:], strict=False):
        if place and first < last:
            seen[first:last] = run_delta(rows[first:last], d, state, place, int(where.positions[first]))
    seen = plain.rms_norm(seen, layer.norm.weight.to(dtype), layer.norm.eps)
    return (seen * (gate @ layer.g_b.data.to(dtype).T).sigmoid().view_as(seen)).flatten(1)


def compare_steps(layer: Layer, steps: Sequence[Sequence[Run]], are_alike: bool = False) -> float:
    """The largest difference from fp64 over steps that follow each other: of results and of states, relative to the
    norm of each. States of the kernels go on from step to step, and so do those of the reference. `are_alike`: all
    tokens of a step are the same."""
    device = str(layer.delta.conv.device)
    places = 1 + max(place for runs in steps for place, _, _ in runs)
    state = make_states(layer, places)
    right = DeltaState(*(part.double() for part in state))
    worst = 0.0
    for runs in steps:
        where = find_where(runs, PADDING, device)
        inputs = draw_inputs(layer, len(where.positions), are_alike)
        found = run_recurrence(
            *inputs, layer.f_b, layer.g_b, layer.delta, layer.norm, state, where, multiply=plain.linear
        )
        expected = run_reference(inputs, layer, right, where, torch.float64)
        pairs = [(found, expected), *((a[1:], b[1:]) for a, b in zip(state, right, strict=True))]
        assert all(bool(a.isfinite().all()) for a, _ in pairs)
        assert not found[-PADDING:].any() and not state.matrix[0].any()
        worst = max(worst, *(float((a - b).norm() / b.norm()) for a, b in pairs if b.any()))
    return worst
