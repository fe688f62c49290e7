"""The benchmarks of a device, on a CPU: what they count, what they build, how they are called. Times are not tested."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from commands import Run

from saccade.batch import Batch
from saccade.bench import arms, indexer, profile, record, rig, unfused
from saccade.bench.__main__ import main, parse
from saccade.bench.bytes import HELD, LEAST, Storage, count_bytes, count_layer, count_operations, expect_experts
from saccade.bench.decode import bench_decode
from saccade.bench.eager import EagerSteps, prefill, random_tokens, shuffle_pages
from saccade.bench.fill import fill
from saccade.bench.plot import LAYER, draw_layer, list_layer
from saccade.bench.prefill import bench_prefill
from saccade.bench.shapes import SHAPES, find_shape
from saccade.bench.start import STAGES, run_once
from saccade.bench.synthetic import draw_codes, make_weights, plan_weights
from saccade.cache import Cache
from saccade.checkpoint.encoding import FP8_BLOCKS
from saccade.errors import RequestError
from saccade.kernels import PAGE
from saccade.kernels.reference import decode
from saccade.model.transformer import Transformer

CPU = torch.device("cpu")
V32 = "v32-rank-of-8"


@pytest.fixture(scope="module")
def small() -> rig.Rig:
    return rig.build_rig("bundled", None, CPU)


# Bytes: the reference table of the rank of eight, counted by hand there.


@pytest.mark.parametrize(("layer", "megabytes"), [(5, 107.77), (0, 104.10)])
def test_a_layer_of_the_rank_moves_the_bytes_of_the_table(layer: int, megabytes: float) -> None:
    counted = sum(count_layer(find_shape(V32).config, layer, 1, 8192, storage=LEAST).values())
    assert counted / 1e6 == pytest.approx(megabytes, rel=1e-3)


@pytest.mark.parametrize(
    ("batch", "context", "gigabytes"),
    [(1, 8192, 6.794), (1, 32768, 6.992), (1, 131072, 7.784), (2, 8192, 9.5), (4, 8192, 14.6), (8, 8192, 24.1)],
)
def test_a_step_moves_the_bytes_of_the_table(batch: int, context: int, gigabytes: float) -> None:
    counted = count_bytes(find_shape(V32).config, batch, context, storage=LEAST)
    assert counted["lm_head"] / 1e6 == pytest.approx(231.7, abs=0.05)
    assert sum(counted.values()) / 1e9 == pytest.approx(gigabytes, rel=5e-3)


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
    types = find_shape(name, layers).config.mlp_layer_types
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
    cache = Cache.allocate(small.shape.config, 4, "auto", CPU, mtp=False)
    table = shuffle_pages(1, 3, CPU)
    small.watch = []
    tokens = random_tokens(small.shape.config.vocab_size, 150, CPU)
    last = prefill(small.model, cache, tokens, table, 100)
    chosen, small.watch = torch.cat([w.flatten() for w in small.watch]), None
    assert 0.8 < last.std() < 1.2
    share = torch.bincount(chosen, minlength=8) / len(chosen)
    assert share.min() > 0.04 and share.max() < 0.3  # 1/8 each by chance
    for rows in (*cache.latent, *cache.index_keys):
        assert rows is not None and 0.8 < rows[table[0, 0] * PAGE :][:PAGE].float().std() < 1.3


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
    cache, whole = (Cache.allocate(config, 3, "float32", CPU, mtp=False) for _ in range(2))
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
    cache = Cache.allocate(small.shape.config, 5, "auto", CPU, mtp=False)
    table = shuffle_pages(2, 2, CPU)
    rows = small.make_rows(100)
    said = fill(cache, table, 100, rows)
    first = cache.latent[2].unflatten(0, (-1, PAGE))[table[0]].flatten(0, 1)[:100]
    second = cache.latent[2].unflatten(0, (-1, PAGE))[table[1]].flatten(0, 1)[:100]
    assert torch.equal(first, rows[2].latent[:100]) and "prefill of 100" in said
    near = rows[2].latent[(torch.arange(100) + 977) % 100].float()
    assert 0.01 < (second.float() - near).abs().mean() < 0.1
    assert "random normal" in fill(cache, table, 100, None)


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
    made: list[Any] = []

    class FastModel:
        def __init__(self, model: Transformer, arrangement: str) -> None:
            made.append((model, arrangement))

        def forward(self, batch: Batch, cache: Cache) -> torch.Tensor:
            raise NotImplementedError

        logits = forward

    fake = ModuleType("fast")
    vars(fake)["FastModel"] = FastModel
    monkeypatch.setattr(rig, "find_engine", lambda module, _: fake)
    assert small.make_model("fused") is small.make_model("fused") is not small.model
    assert made == [(small.model, "fused")]


def test_prefill_counts_every_chunk() -> None:
    (found,) = bench_prefill("bundled", contexts=(100,), chunk=64, repeats=1, device="cpu")
    assert found["bytes"] == 2 * plan_weights(find_shape("bundled").config).device_bytes and found["ttft_ms"] > 0


# The indexer's arrangements.


def test_the_unfused_gemm_multiplies_what_was_quantised() -> None:
    (o,) = arms.make_operands(find_shape("bundled").config, 3, 1, CPU)
    codes, scales = unfused.quantize_activations(o.x16)
    wanted = (codes[:3].float() * scales[:3].repeat_interleave(128, 1)) @ decode(o.wk).T
    for tile in unfused.TILES:
        found = unfused.multiply_blocks(codes, scales, o.wk, 3, tile).float()
        error = (found - wanted).norm() / wanted.norm()
        print(f"tile {tile}: {error:.1e}")
        assert error < 4e-3  # of rounding to BF16
    back = codes[:3].float() * scales[:3].repeat_interleave(128, 1)
    # On a GPU 2.5e-2; the interpreter cuts numbers off instead of rounding them.
    assert (back - o.x).norm() / o.x.norm() < 8e-2


def test_an_arm_computes_key_and_weights_or_says_why_not() -> None:
    operands = arms.make_operands(find_shape("bundled").config, 1, 1, CPU)
    fused = next(arm for arm in arms.ARMS if "cuBLAS" in arm.name)
    assert arms.find_error(fused, operands[0]) < 4e-3
    streams = next(arm for arm in arms.ARMS if arm.key == "c")
    assert indexer.compare_arm(streams, operands, "no base", 1) == {"failed": "two streams need a CUDA device"}
    assert {arm.key for arm in arms.ARMS} == set("abcdef")


@pytest.mark.parametrize("arm", [arm for arm in arms.ARMS if arm.key in "bdef"], ids=lambda arm: arm.name[:24])
def test_our_own_arms_compute_what_the_others_do(arm: arms.Arm, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the products in plain torch: which matrices an arm multiplies, in which order."""
    monkeypatch.setattr(arms, "product", lambda x, *parts: torch.cat([x @ decode(part).T for part in parts], 1))
    (o,) = arms.make_operands(find_shape("bundled").config, 2, 1, CPU)
    assert arms.find_error(arm, o) < 4e-3


# Layers and pictures.


def test_a_layer_is_found_as_what_repeats() -> None:
    head, dense, sparse, tail = ["embed"], ["a", "b", "b", "d"], ["a", "b", "b", "r", "e", "e"], ["n", "l", "m"]
    names = head + 2 * dense + 5 * sparse + tail
    assert profile.find_layer(names) == (len(head + 2 * dense), 6, 5)
    assert profile.find_layer(["a", "b", "c"]) is None
    kernels = [(name, float(i)) for i, name in enumerate(names)]
    assert profile.fold_layer(kernels)[0] == ("a", 9 + 12.0)  # the mean of 9, 15, 21, 27, 33
    assert profile.fold_layer(kernels[:3]) == kernels[:3]


def test_a_kernel_s_time_starts_where_the_one_before_ended() -> None:
    def spans(at: float) -> list[profile.Span]:
        return [profile.Span("a", at, at + 5), profile.Span("b", at + 3, at + 9), profile.Span("c", at + 11, at + 12)]

    seen = [span for i in range(3) for span in reversed(spans(100.0 * i))]
    assert profile.merge_runs(seen, 3) == [("a", 5.0), ("b", 4.0), ("c", 3.0)]
    assert profile.merge_runs(seen[:-1], 3) == []  # a kernel is missing
    assert profile.time_kernels(lambda: None, CPU) == []


def test_kernels_get_their_bytes_if_they_are_as_many_as_expected() -> None:
    config = find_shape(V32, 8).config
    names = [f"_{launch.hint or 'multiply'}_kernel" for launch in LAYER]
    kernels = [("embed", 1.0), *[(name, 10.0) for _ in range(5) for name in names], ("head", 70.0)]
    bars = list_layer(kernels, config, 1, 8192, 8.0)
    assert [label for label, _, _ in bars] == [launch.label for launch in LAYER]
    assert sum(b for _, _, b in bars) == pytest.approx(sum(count_layer(config, 7, 1, 8192, 8.0).values()))
    other = list_layer([("x", 1.0), ("y", 2.0)], config, 1, 8192, 8.0)
    assert [bar[:2] for bar in other] == [("x", 1.0), ("y", 2.0), ("bytes of the layer", 0.0)]


def test_a_drawn_layer_is_svg_with_bars_to_scale() -> None:
    text = draw_layer([("q_a <&> kv_a", 8.0, 17e6), ("select", 4.0, 0.0)], 4e12, "one layer")
    root = ElementTree.fromstring(text)
    space = "{http://www.w3.org/2000/svg}"
    widths = [float(r.get("width", 0)) for r in root.iter(space + "rect") if r.get("rx")]
    said = [t.text or "" for t in root.iter(space + "text")]
    assert widths[0] == 2 * widths[2] and widths[1] == pytest.approx(widths[0] * 17 / 32, abs=0.1) and widths[3] == 0
    assert "q_a <&> kv_a" in said and "8.0 µs, 17.0 MB, 53% of the bandwidth" in said
    assert any("12.0 µs; its 17.0 MB take 4.2 µs" in line for line in said)


# Command lines.


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["decode", "--shape", "v4"], "shape: expected one of v32-rank-of-8"),
        (["decode", "--shape", "bundled", "--layers", "9"], "layers: expected an integer from 1 to 4, found 9"),
        (["decode", "--arrangement", "packed"], "arrangement packed needs a CUDA device"),
        (["prefill", "--arrangement", "fast"], "arrangement: expected one of packed"),
        (["decode", "--batch", "1,x"], "batch: expected integers of at least 1 with commas between, found '1,x'"),
        (["decode", "--batch", "0"], "batch: expected integers of at least 1"),
        (["decode", "--shape", "bundled", "--context", "9999"], "context: expected 21 (more than the steps) to 4096"),
        (["decode", "--shape", "bundled", "--steps", "0"], "steps: expected an integer of at least 1"),
        (["decode", "--device", "tpu"], "device: expected cuda, cuda:1 or cpu, found 'tpu'"),
        (["start", "--batch", "1,2"], "start takes one arrangement, one context and one batch"),
    ],
)
def test_what_cannot_be_measured_is_one_clear_line(
    run: Run, capsys: pytest.CaptureFixture[str], line: list[str], message: str
) -> None:
    line = line if "--device" in line else [*line, "--device", "cpu"]
    ran = run("bench", *line)
    assert (ran.code, ran.out) == (2, "") and ran.err.startswith(f"saccade: {message}") and ran.err.count("\n") == 1
    assert main(line) == 2  # without typer, the same
    assert capsys.readouterr() == ("", ran.err)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
@pytest.mark.parametrize("command", ["decode", "prefill", "indexer", "start"])
def test_without_a_gpu_each_command_says_so(run: Run, command: str) -> None:
    ran = run("bench", command)
    assert ran.code == 2 and ran.err.startswith("saccade: this benchmark needs a CUDA device")


def test_both_command_lines_have_the_same_options(run: Run) -> None:
    for command in ("decode", "prefill", "indexer", "start"):
        shown = set(re.findall(r"--[a-z][a-z-]+", run("bench", command, "--help").out)) - {"--help"}
        plain = {"--" + name.replace("_", "-") for name in vars(parse([command])) if name != "command"}
        assert shown >= plain, command


def test_records_are_written_and_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results" / "x.json"
    line = ["decode", "--shape", "bundled", "--device", "cpu", "--context", "64", "--steps", "1", "--repeats", "1"]
    assert main([*line, "--random-cache", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    (written,) = json.loads(out.read_text())
    assert "ms a token" in printed and written["cache"] == "random normal rows" and written["context"] == 64
    assert [file.name for file in out.parent.iterdir()] == ["x.json"]
    assert main([*line, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["shape"] == "bundled"


def test_the_module_needs_no_typer() -> None:
    program = "import sys; sys.modules['typer'] = None; import saccade.bench.__main__"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def test_a_start_is_timed_stage_by_stage_in_a_process_of_its_own(tmp_path: Path) -> None:
    wish = {"shape": "bundled", "layers": 1, "context": 20, "batch": 2, "arrangement": "reference", "device": "cpu"}
    found = run_once({**wish, "seed": 0}, str(tmp_path))
    stages = [found[f"{stage}_s"] for stage in STAGES]
    assert min(stages) >= 0 and found["imports_s"] > 0.1 and found["first_token_s"] > 0
    assert sum(stages) == pytest.approx(found["total_s"])
    with pytest.raises(RequestError, match="the process that was timed failed: .*shape: expected one of"):
        run_once({**wish, "seed": 0, "shape": "v4"}, str(tmp_path))


def test_tables_line_up() -> None:
    rows = [{"name": "a", "n": 1.5}, {"name": "long", "n": None}]
    assert record.print_table(rows, (("name", "what", ""), ("n", "n", ".2f"))) == "what     n\na     1.50\nlong     -"


def test_fp8_index_keys_halve_their_bytes() -> None:
    c = find_shape(V32).config
    half = count_layer(c, 5, 1, 8192, storage=Storage(key=LEAST.key))["index keys"]
    assert half / count_layer(c, 5, 1, 8192)["index keys"] == pytest.approx(132 / 256)
