"""Experts that are given instead of the router's, and recordings of them, in steps on a CPU."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from saccade.bench.bytes import expect_experts
from saccade.bench.rig import build_rig
from saccade.bench.shapes import find_shape
from saccade.bench.steps.chunks import bench_chunks, show_chunks
from saccade.bench.steps.decode import bench_decode, show_decode
from saccade.bench.steps.prefill import bench_prefill, show_prefill
from saccade.bench.steps.routing import (
    GivenChoice,
    count_distinct,
    find_experts,
    give_experts,
    watch_experts,
    write_recording,
)
from saccade.bench.steps.traffic import bench_engine, show_engine
from saccade.errors import RequestError
from saccade.kernels.types import Routing
from saccade.ops.reference import Reference

CPU = torch.device("cpu")
DECODE: dict[str, Any] = {"contexts": (70,), "steps": 2, "repeats": 1, "device": "cpu", "layers": 4}


def test_each_layer_takes_its_own_and_a_step_repeats_them() -> None:
    given = torch.arange(24).view(2, 3, 4)
    choice, routing = GivenChoice(given), Routing(torch.zeros(64), 1, 1, 4, 2.5)
    logits = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    first, second, again = (choice.choose_experts(logits, routing) for _ in range(3))
    assert first[0].equal(again[0]) and first[0].equal(given[0][[0, 1, 2, 0, 1]])
    assert second[0].equal(given[1][[0, 1, 2, 0, 1]])  # and tokens beyond the last begin again
    torch.testing.assert_close(first[1].sum(1), torch.full((5,), 2.5))
    wanted = logits.gather(1, first[0]).sigmoid()
    torch.testing.assert_close(first[1] / first[1][:, :1], wanted / wanted[:, :1])


def test_any_expert_is_as_likely_as_any_other() -> None:
    config = find_shape("v32-rank-of-8", 6).config
    uniform = find_experts("uniform", config, CPU)
    assert uniform is not None and not uniform[0].equal(uniform[1])
    assert all(len(row.unique()) == 8 for row in uniform[0, :100])
    for tokens in (8, 32):
        seen = [layer[i : i + tokens] for layer in uniform for i in range(0, 640, tokens)]
        assert count_distinct(seen) == pytest.approx(expect_experts(config, tokens), rel=0.02)
    assert find_experts("router", config, CPU) is None


def test_what_is_recorded_is_taken_again(tmp_path: Path) -> None:
    """The router's of a step, then given to another model of other weights: the same experts, layer by layer."""
    path = str(tmp_path / "experts.npy")
    (router,) = bench_decode("bundled", batches=(5,), record_experts=path, **DECODE)
    found = np.load(path)
    assert found.shape == (2, 5, 2) and found.dtype == np.uint8
    distinct = np.mean([len(np.unique(layer)) for layer in found])
    (recorded,) = bench_decode("bundled", batches=(5,), experts=f"recorded:{path}", seed=7, **DECODE)
    assert recorded["distinct_experts"] == router["distinct_experts"] == distinct
    assert recorded["bytes_per_step"] == router["bytes_per_step"] and recorded["same_tokens_every_time"]
    assert f"experts: recorded:{path}, not the router's; a step takes the first of 5 tokens" in show_decode([recorded])
    fewer = build_rig("bundled", 3, CPU, experts=f"recorded:{path}").given
    assert fewer is not None and fewer.equal(torch.from_numpy(found[:1]).long())  # the first of its sparse layers
    rig = build_rig("bundled", 4, CPU, seed=7, experts=f"recorded:{path}")
    ops = Reference()
    assert rig.given is not None
    give_experts(ops, rig.given)
    seen = watch_experts(ops)
    for _ in range(2):
        ops.choose_experts(torch.randn(5, 8), Routing(torch.zeros(8), 1, 1, 2, 1.0))
    assert torch.stack(seen).equal(torch.from_numpy(found.astype("int64")))


def test_a_prompt_is_recorded_over_all_of_its_steps(tmp_path: Path) -> None:
    path, again = str(tmp_path / "prompt.npy"), str(tmp_path / "again.npy")
    options: dict[str, Any] = {"layers": 4, "contexts": (50,), "chunk": 50, "repeats": 1, "device": "cpu"}
    bench_prefill("bundled", record_experts=path, **options)
    bench_prefill("bundled", record_experts=again, **{**options, "chunk": 20})
    one, other = np.load(path), np.load(again)
    assert one.shape == other.shape == (2, 50, 2) and (one == other).mean() > 0.99  # sums of other lengths
    (record,) = bench_prefill("bundled", experts=f"recorded:{path}", **options)
    assert record["distinct_experts"] == np.mean([len(np.unique(layer)) for layer in one])
    assert "a step takes the first of 50 tokens" in show_prefill([record])


@pytest.mark.parametrize("experts", ["router", "uniform"])
def test_engines_and_chunks_print_their_experts(experts: str) -> None:
    how: dict[str, Any] = {"layers": 2, "device": "cpu", "experts": experts}
    (busy,) = bench_engine("bundled", clients=(3,), prompt=5, output=3, **how)
    (chunk,) = bench_chunks("bundled", chunks=(8,), decodes=2, context=20, repeats=1, **how)
    if experts == "uniform":
        given = find_experts("uniform", find_shape("bundled", 2).config, CPU)
        assert given is not None
        assert busy["distinct_experts"] == count_distinct([given[0, :3]])
        assert chunk["distinct_experts"] == count_distinct([given[0, :8]])
    assert 2 <= busy["distinct_experts"] <= chunk["distinct_experts"] <= 8
    for text in (show_engine([busy]), show_chunks([chunk])):
        assert ("uniform, not the router's" in text) == (experts == "uniform") and "distinct ones" in text


def test_experts_that_cannot_be_given_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "experts.npy"

    def refuse(match: str, **options: Any) -> None:
        with pytest.raises(RequestError, match=match):
            bench_decode("bundled", **{**DECODE, **options})

    def refuse_recording(match: str, ids: Any) -> None:
        np.save(path, ids)
        refuse(match, experts=f"recorded:{path}")

    refuse("experts: expected router, uniform or recorded:FILE, found 'even'", experts="even")
    refuse("experts: steps with drafts take the router's", experts="uniform", drafts=(1,))
    refuse("experts: .*none.npy cannot be read as a NumPy file", experts=f"recorded:{tmp_path / 'none.npy'}")
    path.write_text("not a recording")
    refuse("cannot be read as a NumPy file", experts=f"recorded:{path}")
    refuse_recording("expected integers", np.zeros((2, 3, 2)))
    refuse_recording("expected integers", np.zeros((3, 2), "uint8"))
    good = np.tile(np.array([0, 7], "uint8"), (2, 3, 1))
    refuse_recording(r"expected the shape \[2 or more sparse layers, tokens, 2\], found \[1, 3, 2\]", good[:1])
    refuse_recording(r"found \[2, 3, 1\]", good[:, :, :1])
    refuse_recording(r"found \[2, 0, 2\]", good[:, :0])
    refuse_recording("has expert 8; the model has 0 to 7", good + 1)
    refuse_recording("gives an expert to a token twice", good * 0)
    refuse("record-experts: expected a file to write to", record_experts=str(tmp_path))
    refuse("record-experts: expected one batch and one context, found 2", record_experts=str(path), batches=(1, 2))


def test_many_experts_are_recorded_in_16_bits(tmp_path: Path) -> None:
    config = find_shape("glm5-next-rank-of-8", 6, with_flash=True).config
    assert config.n_routed_experts == 288 and config.mlp_layer_types.count("sparse") == 3
    seen = [torch.full((2, 8), 280 + i) for i in range(3)]
    write_recording(str(tmp_path / "x.npy"), seen, config)
    found = np.load(tmp_path / "x.npy")
    assert found.dtype == np.uint16 and found[:, 0, 0].tolist() == [280, 281, 282]
