"""The benchmarks of a device, on a CPU: what they count and what they build. Times are not tested."""

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from saccade.bench import rig
from saccade.bench.bytes import HELD, SMALLEST, count_bytes, count_layer, count_operations, expect_experts
from saccade.bench.projection.arranged import find_ops
from saccade.bench.shapes import SHAPES, find_shape
from saccade.bench.steps.decode import bench_decode
from saccade.bench.steps.eager import EagerSteps, prefill, random_tokens, shuffle_pages
from saccade.bench.steps.fill import fill_caches
from saccade.bench.steps.prefill import bench_prefill
from saccade.bench.steps.routing import watch_experts
from saccade.bench.synthetic import draw_codes, make_weights, plan_weights
from saccade.checkpoint.encoding import FP8_BLOCKS
from saccade.engine.pages import allocate_cache
from saccade.kernels import PAGE
from saccade.kernels.reference import decode
from saccade.models.dsa.transformer import Transformer
from saccade.ops.interface import Ops, Residual
from saccade.ops.reference import Reference

CPU = torch.device("cpu")
V32 = "v32-rank-of-8"


@pytest.fixture(scope="module")
def small() -> rig.Rig:
    return rig.build_rig("bundled", None, CPU)


# Bytes: the reference table of the rank of eight, counted by hand there.


@pytest.mark.parametrize(("layer", "megabytes"), [(5, 107.77), (0, 104.10)])
def test_a_layer_of_the_rank_moves_the_bytes_of_the_table(layer: int, megabytes: float) -> None:
    counted = sum(count_layer(find_shape(V32).config, layer, 1, 8192, storage=SMALLEST).values())
    assert counted / 1e6 == pytest.approx(megabytes, rel=1e-3)


@pytest.mark.parametrize(
    ("batch", "context", "gigabytes"),
    [(1, 8192, 6.794), (1, 32768, 6.992), (1, 131072, 7.784), (2, 8192, 9.5), (4, 8192, 14.6), (8, 8192, 24.1)],
)
def test_a_step_moves_the_bytes_of_the_table(batch: int, context: int, gigabytes: float) -> None:
    counted = count_bytes(find_shape(V32).config, batch, context, storage=SMALLEST)
    assert counted["lm_head"] / 1e6 == pytest.approx(231.7, abs=0.05)
    assert sum(counted.values()) / 1e9 == pytest.approx(gigabytes, rel=5e-3)


def test_matrices_of_a_layer_are_those_of_the_plan() -> None:
    """By hand, for the rank of eight: codes with a scale for each 128 x 128 block, or BF16."""
    c = find_shape(V32).config
    held, packed = count_layer(c, 5, 2, 8192, 8.0), count_layer(c, 5, 2, 8192, 8.0, SMALLEST)
    assert held["q_b_proj"] == 16 * 192 * 1536 + 4 * 24 * 12
    assert held["qkv_a_proj"] == (1536 + 576) * 7168 + 4 * 17 * 56
    assert held["experts.down_proj"] == 8 * (7168 * 256 + 4 * 56 * 2)
    assert held["gate"] == 256 * (7168 * 2 + 4)
    assert held["norms"] == 4 * (2 * 7168 + 1536 + 512 + 2 * 128)
    assert held["wk_weights_proj"] == 192 * 7168 * 2
    assert packed["wk_weights_proj"] == 128 * 7168 + 4 * 56 + 64 * 7168 * 2
    assert (held["w_uk"], packed["w_uk"]) == (16 * 128 * 512 * 2, 16 * 128 * 512 + 4 * 16 * 4)
    assert held["latent cache"] == 2 * 2049 * 576 * 2
    assert (held["index keys"], packed["index keys"]) == (2 * 8193 * 256, 2 * 8193 * 132)
    coded = count_layer(c, 5, 2, 8192, 8.0, HELD._replace(latent_cache="fp8"))
    assert coded == held | {"latent cache": 2 * 2049 * 644}


def test_eight_tokens_choose_57_of_256_experts() -> None:
    config = find_shape(V32).config
    assert expect_experts(config, 1) == pytest.approx(8) and expect_experts(config, 8) == pytest.approx(57.4, abs=0.05)


@pytest.mark.parametrize("shape", ["bundled", V32])
def test_weights_are_counted_as_the_loader_holds_them(shape: str) -> None:
    """With every expert read, the weights of a step are all that is loaded, but for the embedding's other rows."""
    plan = plan_weights(find_shape(shape, 2).config)
    c = plan.config
    counted = count_bytes(c, 1, c.index_topk + 1, c.n_routed_experts, HELD)
    for cached in ("latent cache", "index keys", "embed_tokens"):
        del counted[cached]
    assert sum(counted.values()) == plan.device_bytes - plan.stored["model.embed_tokens"].nbytes


def test_below_index_topk_nothing_is_scored() -> None:
    c = find_shape(V32).config
    short, long = count_layer(c, 5, 1, c.index_topk), count_layer(c, 5, 1, c.index_topk + 1)
    assert "wq_b" in long and "wq_b" not in short and short["index keys"] < 300 < long["index keys"]


def test_operations_grow_with_the_square_of_the_context_only_in_the_index_logits() -> None:
    c = find_shape(V32).config
    once, twice = count_operations(c, 8192), count_operations(c, 16384)
    growth = {name: twice[name] / once[name] for name in once}
    assert growth["index logits"] == pytest.approx(4, rel=1e-3)
    assert growth["projections"] == growth["MLPs"] == pytest.approx(2) and 2 < growth["attention"] < 2.2


# Shapes and weights.


def test_the_rank_of_eight_is_84_gb() -> None:
    plan = plan_weights(find_shape(V32).config)
    assert plan.device_bytes == pytest.approx(86.0e9, rel=5e-3)  # 80.1 GiB
    assert plan.stored["model.layers.5.mlp.experts.gate_up_proj"].shape == (256, 512, 7168)
    assert plan.stored["model.layers.5.self_attn.indexer.wk_weights_proj"].shape == (192, 7168)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("layers", [1, 2, 4])
def test_fewer_layers_keep_the_kinds(name: str, layers: int) -> None:
    types = find_shape(name, layers, with_flash=True).config.mlp_layer_types
    assert len(types) == layers and types[-1] == "sparse" and (types[0] == "dense") == (layers > 1)


def test_codes_spread_like_weights_and_are_never_nan() -> None:
    codes = draw_codes(100_000, torch.Generator().manual_seed(0))
    numbers = codes.view(torch.float8_e4m3fn).float()
    assert numbers.isfinite().all() and 90 < numbers.std() < 100 and abs(numbers.mean()) < 2


def test_synthetic_weights_are_what_the_plan_says(small: rig.Rig) -> None:
    plan = plan_weights(find_shape("bundled").config)
    weights = make_weights(plan, "cpu")
    for name, stored in plan.stored.items():
        assert tuple(weights.held[name].shape) == stored.shape
    for name in ("o_proj", "indexer.wq_b"):
        stored = plan.stored[f"model.layers.1.self_attn.{name}"]
        assert stored.encoding is FP8_BLOCKS
        numbers = decode(weights.matrix(stored.name))
        assert numbers.std() * stored.shape[1] ** 0.5 == pytest.approx(1, abs=0.08)  # of 8 scales each is one of two
    a, b = (weights.held[f"model.layers.{i}.self_attn.o_proj"].view(torch.uint8) for i in (0, 1))
    assert (a == b).float().mean() < 0.1  # other numbers in every layer


def test_activations_and_routing_stay_lively(small: rig.Rig) -> None:
    """Hidden states of 1 through all layers, tokens that differ, and experts about as spread as chance would have it."""
    cache = allocate_cache(small.shape.config, 4, "auto", CPU, mtp=False)
    table = shuffle_pages(1, 3, CPU)
    ops = Reference()
    seen = watch_experts(ops)
    tokens = random_tokens(small.shape.config.vocab_size, 150, CPU)
    last = prefill(small.model.with_ops(ops), cache, tokens, table, 100)
    chosen = torch.cat([experts.flatten() for experts in seen])
    assert 0.8 < last.std() < 1.2
    share = torch.bincount(chosen, minlength=8) / len(chosen)
    assert share.min() > 0.04 and share.max() < 0.3  # 1/8 each by chance
    for pool in (*cache.latent, *cache.index_keys):
        assert 0.8 < pool.data[table[0, 0] * PAGE :][:PAGE].float().std() < 1.3


def test_wk_is_exact_in_fp8() -> None:
    """So that arrangements that keep its codes compute with the same weights."""
    config = find_shape("bundled").config
    held = make_weights(plan_weights(config), "cpu").held["model.layers.0.self_attn.indexer.wk_weights_proj"]
    block = held[:128, :128].float()
    exponents = torch.tensor([2.0**e for e in range(-30, 10)])
    scaled = block[None] / exponents[:, None, None]
    exact = (scaled.to(torch.float8_e4m3fn).float() == scaled).flatten(1).all(1)
    assert exact.any()


# Steps.


def test_decode_steps_go_on_where_prefill_would(small: rig.Rig) -> None:
    """The state after decoding tokens one by one is that of a prefill of the same tokens."""
    config, n = small.shape.config, 70
    table, tokens = shuffle_pages(1, 2, CPU), random_tokens(config.vocab_size, n, CPU)
    cache, whole = (allocate_cache(config, 3, "float32", CPU, mtp=False) for _ in range(2))
    prefill(small.model, cache, tokens, table, n)
    steps = EagerSteps(small.model, cache, 1)
    steps.load(torch.tensor([7]), torch.tensor([n]), table)
    chosen = []
    for _ in range(3):
        steps.run()
        chosen.append(int(steps.tokens))
    for i in range(3):
        told = torch.cat([tokens, torch.tensor([7, *chosen[:i]])])
        assert int(small.model.logits(prefill(small.model, whole, told, table, 64)).argmax()) == chosen[i]


def test_a_cache_is_filled_with_the_rows_of_a_prefill(small: rig.Rig) -> None:
    cache = allocate_cache(small.shape.config, 5, "auto", CPU, mtp=False)
    table = shuffle_pages(2, 2, CPU)
    rows = small.make_rows(100)
    said = fill_caches(cache, table, 100, rows)
    first = cache.latent[2].data.unflatten(0, (-1, PAGE))[table[0]].flatten(0, 1)[:100]
    second = cache.latent[2].data.unflatten(0, (-1, PAGE))[table[1]].flatten(0, 1)[:100]
    assert torch.equal(first, rows[2].latent[:100]) and "prefill of 100" in said
    near = rows[2].latent[(torch.arange(100) + 977) % 100].float()
    assert 0.01 < (second.float() - near).abs().mean() < 0.1
    assert "random normal" in fill_caches(cache, table, 100, None)


def test_a_decode_record_says_all_that_is_asked_of_it() -> None:
    one, two = bench_decode("bundled", batches=(1, 2), contexts=(130,), steps=2, repeats=2, device="cpu", commit="abc")
    asked = {"shape", "layers", "batch", "context", "tpot_ms", "arrangement", "share_of_bandwidth", "commit", "device",
             "torch", "triton", "driver", "date", "command", "samples_ms", "bytes_per_step", "kernels_per_layer",
             "read_bandwidth_gb_s", "limit_ms", "start_s", "distinct_experts"}  # fmt: skip
    assert asked <= one.keys() and (one["batch"], two["batch"], one["commit"]) == (1, 2, "abc")
    assert len(one["samples_ms"]) == 2 and one["same_tokens_every_time"]
    moved = sum(count_bytes(find_shape("bundled").config, 2, 130, two["distinct_experts"]).values())
    assert two["bytes_per_step"] == moved
    assert two["share_of_bandwidth"] == pytest.approx(two["limit_ms"] / two["tpot_ms"])
    json.dumps([one, two])


def test_arrangements_are_the_engine_s_and_made_once(small: rig.Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[str, Transformer]] = []

    def note(name: str, model: Transformer) -> Ops:
        made.append((name, model))
        return Reference()

    monkeypatch.setattr(rig, "find_ops", note)
    fused = small.make_model("fused")
    assert fused is small.make_model("fused") is not small.model and made == [("fused", small.model)]
    assert fused.layers is small.model.layers and fused.ops is not small.model.ops


@pytest.mark.parametrize("name", ["packed", "packed-fp8", "fused", "separate"])
def test_an_arrangement_projects_the_same_numbers(small: rig.Rig, name: str) -> None:
    """Of two tokens and of three; on weights that FP8 holds exactly."""
    model, layer = small.model, small.model.layers[2]
    ops = find_ops(name, model)
    assert layer.attention.indexer is not None
    weights = [layer.attention.qkv_a_proj, layer.attention.indexer.projection]
    for tokens in (2, 3):
        ids = torch.arange(tokens)
        x, _ = ops.begin(ids, ids, model.embed_tokens, model.rotary, layer.input_norm)
        expected = Reference().project(
            Residual(model.embed_tokens.rows[ids].float(), layer.input_norm), layer.input_norm, weights
        )
        found = ops.project(x, layer.input_norm, weights)
        for part, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(part, wanted, rtol=1e-4, atol=1e-4)


def test_prefill_counts_every_chunk() -> None:
    (found,) = bench_prefill("bundled", contexts=(100,), chunk=64, repeats=1, device="cpu")
    assert found["bytes"] == 2 * plan_weights(find_shape("bundled").config).device_bytes and found["ttft_ms"] > 0
    assert found["activations"] == "exact"


def test_prefill_takes_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, forward = list[str](), Transformer.forward

    def note(model: Transformer, *rest: Any) -> Tensor:
        seen.append(model.ops.activations)
        return forward(model, *rest)

    monkeypatch.setattr(Transformer, "forward", note)
    (found,) = bench_prefill("bundled", 1, contexts=(70,), repeats=1, device="cpu", activations="fp8")
    assert found["activations"] == "fp8" and set(seen) == {"fp8"}
