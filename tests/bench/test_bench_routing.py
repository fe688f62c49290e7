"""Experts that are as likely as any other, in steps on a CPU."""

import pytest
import torch

from saccade.bench.bytes import expect_experts
from saccade.bench.shapes import find_shape
from saccade.bench.steps.decode import bench_decode, show_decode
from saccade.bench.steps.routing import UniformChoice, count_spread_experts
from saccade.errors import RequestError
from saccade.kernels.types import Routing


def test_any_expert_is_as_likely_as_any_other_and_a_step_repeats_its_choice() -> None:
    choice, routing = UniformChoice(2), Routing(torch.zeros(64), 1, 1, 4, 2.5)
    logits = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    first, second, again = (choice.choose_experts(logits, routing) for _ in range(3))
    assert first[0].equal(again[0]) and not first[0].equal(second[0])  # two layers, and the next step's first
    assert all(len(row.unique()) == 4 for row in first[0]) and first[0].dtype == torch.int32
    torch.testing.assert_close(first[1].sum(1), torch.full((5,), 2.5))
    config = find_shape("v32-rank-of-8").config
    for tokens in (8, 32):
        assert count_spread_experts(config, tokens) == pytest.approx(expect_experts(config, tokens), rel=0.02)


def test_steps_are_measured_with_experts_that_are_given() -> None:
    options = {"contexts": (70,), "batches": (4,), "steps": 2, "repeats": 1, "device": "cpu", "layers": 2}
    router, uniform = (bench_decode("bundled", experts=how, **options)[0] for how in ("router", "uniform"))  # type: ignore[arg-type]
    config = find_shape("bundled", 2).config
    assert uniform["distinct_experts"] == count_spread_experts(config, 4) != router["distinct_experts"]
    assert uniform["same_tokens_every_time"] and "not the router's" in show_decode([uniform])
    with pytest.raises(RequestError, match="experts: expected router or uniform, found 'even'"):
        bench_decode(experts="even", device="cpu")
    with pytest.raises(RequestError, match="experts: steps with drafts take the router's"):
        bench_decode(experts="uniform", drafts=(1,), device="cpu")
