"""What a plan prints: folded lines stand for exactly what they replace, and detail is there when asked for."""

import json
import math
from dataclasses import replace
from itertools import pairwise

import pytest
from header_checkpoints import BYTES, published
from published_configs import deepseek_v32_config, glm52_config

from saccade.checkpoint.header import Entry
from saccade.checkpoint.index import File, Index
from saccade.errors import PlanError, Problem
from saccade.models.cache_rows import LayerCache, count_token_bytes
from saccade.models.dsa.config import ModelConfig
from saccade.plan import Layout, Plan, make_plan, plan_all, prove
from saccade.plan.explain import explain
from saccade.plan.fold import fold, fold_lines, fold_prose, ranges
from saccade.plan.problems import show_problems
from saccade.plan.reads import count_needed_bytes, count_read_bytes, count_waiting_bytes, rows_needed
from saccade.plan.show import list_rows, plan_json, show_bytes, show_plan
from saccade.plan.types import LoadStep


def small_plan(
    layout: Layout = Layout(), mtp: bool = True, dtype: str = "auto", **changes: tuple[int, ...] | None
) -> Plan:
    """GLM-5.2's layout with 5 layers and 4 experts. `changes`: another shape for a tensor, or None to leave it out."""
    config = glm52_config() | {
        "num_hidden_layers": 5,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "indexer_types": ["full", "full", "full", "shared", "shared"],
        "mlp_layer_types": ["dense"] * 3 + ["sparse"] * 2,
    }
    return make_plan(ModelConfig.from_dict(config), headers(config, changes), layout, dtype, mtp)


def headers(config: dict, changes: dict | None = None) -> Index:
    """The index of a published FP8 repository in one file, without the file."""
    entries, at = {}, 1000
    for name, dtype, shape in published(config, mtp_copies=False):
        shape = (changes or {}).get(name, shape)
        if shape is None:
            continue
        size = math.prod(shape) * BYTES[dtype]
        entries[name] = Entry(name, dtype, shape, "model.safetensors", at, at + size)
        at += size
    return Index("a-model", (File("model.safetensors", at, 1000, len(entries)),), entries, (), (), 1000)


def test_names_that_differ_in_numbers_fold_to_one_line() -> None:
    names = [f"model.layers.{i}.mlp.experts.{e}.gate_proj.weight" for i in range(3, 61) for e in range(256)]
    assert fold(names) == ["model.layers.{3-60}.mlp.experts.{0-255}.gate_proj.weight"]


def test_what_is_no_list_of_names_is_said_as_it_stands() -> None:
    texts = [".".join(map(str, range(3000))), "a." + "9" * 5000, "a." + "8" * 5000, "b.{}.1", "b.{}.2"]
    assert fold(texts) == texts
    assert fold_prose(texts) == texts


def test_a_hole_stays_visible() -> None:
    names = [f"layers.{i}.experts.{e}" for i in range(3) for e in range(4) if (i, e) != (1, 2)]
    assert fold(names) == ["layers.{0,2}.experts.{0-3}", "layers.1.experts.{0-1,3}"]


def test_in_prose_a_layer_named_twice_folds_and_in_names_it_does_not() -> None:
    notes = [f"layers.{i}.x costs {n} bytes: layers.{i}.y" for i in range(3) for n in (16, 32)]
    assert fold_prose(notes) == ["layers.{0-2}.x costs {16,32} bytes: layers.{0-2}.y"]
    assert len(fold(notes)) == 3


def test_folded_lines_stand_for_each_name_once() -> None:
    names = [f"a.{i}.b.{j}" for i in range(7) for j in range(7) if (i * j) % 3 == 1 or i == j] + ["c", "d.1"]
    lines = fold_lines(names)
    assert sorted(i for line in lines for i in line.members) == list(range(len(names)))
    for line in lines:
        assert len(line.members) == math.prod(count(numbers) for numbers in line.text.split(".")[1::2]), line


def count(text: str) -> int:
    """How many numbers `{0-2,6-74:4}` stands for."""
    total = 0
    for run in text.strip("{}").split(","):
        first, _, rest = run.partition("-")
        last, _, step = rest.partition(":")
        total += len(range(int(first), int(last or first) + 1, int(step or 1)))
    return total


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ([7], "7"),
        ([2, 0, 1], "{0-2}"),
        ([0, 1, 2, *range(6, 75, 4)], "{0-2,6-74:4}"),  # the layers of GLM-5.2 with an indexer
        ([1, 3, 5], "{1,3,5}"),
        ([9, 10, 100], "{9-10,100}"),
    ],
)
def test_ranges_are_short_and_exact(numbers: list[int], text: str) -> None:
    assert ranges(map(str, numbers)) == text
    assert count(text) == len(numbers)


def test_numbers_inside_words_are_not_folded() -> None:
    names = ["x.weight_scale_2", "x.weight_scale_3", "F8_E4M3", "F8_E5M2"]
    assert fold(names) == names
    assert fold(["model-00001-of-00003", "model-00003-of-00003"]) == ["model-{00001,00003}-of-00003"]


def test_deepseek_v32_prints_in_forty_lines() -> None:
    config = deepseek_v32_config()
    plan = make_plan(ModelConfig.from_dict(config), headers(config))
    text = show_plan(plan)
    assert len(text.splitlines()) <= 40
    assert f"{len(plan.index.entries):,} tensors" in text
    (line,) = (line for line in text.splitlines() if "wk_weights_proj" in line)
    assert line.startswith("model.layers.{0-61}.self_attn.indexer.wk_weights_proj ")
    assert line.endswith("wk (FP8 128x128 -> BF16) | weights_proj (BF16)")
    (line,) = (line for line in text.splitlines() if "experts.gate_up_proj" in line and "shared" not in line)
    assert line.endswith("{0-255}.gate_proj | {0-255}.up_proj (FP8 128x128)")


def test_a_row_is_one_kind_of_parameter() -> None:
    """Layers whose tensor is stored otherwise have rows of their own, whether they are held otherwise (o_proj) or not
    (kv_b_proj): here one BF16 layer among FP8 ones."""
    plan = small_plan()
    entries = dict(plan.index.entries)
    for name in ("o_proj", "kv_b_proj"):
        weight = f"model.layers.1.self_attn.{name}.weight"
        entries[weight] = entries[weight]._replace(dtype="BF16")
        del entries[weight + "_scale_inv"]
    text = show_plan(make_plan(plan.config, Index("a-model", plan.index.files, entries, (), (), 0)))
    rows = [line.split()[0] for line in text.splitlines() if ".o_proj" in line or ".w_uk" in line]
    places = ["model.layers.{0,2-5}.self_attn.", "model.layers.1.self_attn."]
    assert sorted(rows) == sorted(place + name for name in ("w_uk", "o_proj") for place in places)


def test_a_row_has_one_shape_and_one_slice() -> None:
    """No table makes such a plan today; the printed one would have to show it."""
    plan = small_plan()
    steps = list(plan.steps)
    i = next(i for i, step in enumerate(steps) if step.target == "model.layers.2.self_attn.o_proj")
    steps[i] = steps[i]._replace(take=((1, 6145), (0, 16384)))
    params = [
        p._replace(shape=(1, *p.shape)) if p.name == "model.layers.2.self_attn.q_b_proj" else p for p in plan.params
    ]
    text = show_plan(replace(plan, steps=tuple(steps), params=tuple(params)))
    lines = [line for line in text.splitlines() if line.startswith("model.layers.2.self_attn")]
    assert "[1, 16384, 2048]" in lines[0] and "o_proj[1:6145]" in lines[1]


def test_full_prints_each_parameter_on_its_own_line() -> None:
    plan = small_plan()
    lines = show_plan(plan, full=True).splitlines()
    assert sorted(line.split()[0] for line in lines[1 : lines.index("")]) == sorted(p.name for p in plan.params)


@pytest.mark.parametrize("full", [False, True])
def test_bytes_of_the_rows_are_the_bytes_on_the_device(full: bool) -> None:
    plan = small_plan(Layout(2, 2, 1))
    assert sum(row.nbytes for row in list_rows(plan, full)) == plan.device_bytes
    assert sum(p["bytes"] for p in plan_json(plan)["parameters"]) == plan.device_bytes
    assert show_bytes(plan.device_bytes) in show_plan(plan)


def test_the_largest_rank_decides_what_a_device_must_hold() -> None:
    plans = plan_all(small_plan(Layout(2, 2, 1)))
    assert [p.layout.rank for p in plans] == [0, 1]
    held = [p.device_bytes for p in plans]

    def device(rank: int, held: list[int]) -> str:
        lines = show_plan(plans[rank], ranks=held).splitlines()
        return next(line for line in lines if line.startswith("device")).removeprefix("device").strip()

    most = show_bytes(held[0])
    assert device(0, held) == device(1, held) == f"{most} on each of 2 ranks (dtype auto)"
    more = [held[0], held[1] + 10**9]
    text = f"{show_bytes(more[1])} on rank 1, the most of 2 ranks ({more[0]:,} to {more[1]:,} bytes; {most} on rank 0)"
    assert device(0, more) == text + " (dtype auto)"
    less = [held[0], held[1] - 10]
    assert device(0, less) == f"{most} on rank 0, the most of 2 ranks ({less[1]:,} to {less[0]:,} bytes) (dtype auto)"


def test_slices_of_a_rank_are_shown() -> None:
    text = show_plan(small_plan(Layout(2, 2, 1)))
    assert "{2-3}.gate_proj | {2-3}.up_proj (FP8 128x128)" in text  # experts are divided
    assert "o_proj[:, 8192:16384]" in text  # columns are
    assert "kv_b_proj[32:64, 192:448] (FP8 128x128 -> BF16)" in text  # heads are


def test_ignored_tensors_are_folded_with_their_reason() -> None:
    plan = small_plan(mtp=False)
    text = show_plan(plan)
    assert f"ignored  {len(plan.ignored)} tensors: the MTP layer was not asked for (mtp=False)" in text
    assert "model.layers.5.mlp.experts.{0-3}.gate_proj.weight" in text


def test_bytes_read_count_each_row_once() -> None:
    plan = small_plan()
    assert count_read_bytes(plan) == sum(e.stop - e.start for e in plan.index.entries.values())
    without = small_plan(mtp=False)
    assert count_read_bytes(without) == count_read_bytes(plan) - sum(
        e.stop - e.start for e in plan.index.entries.values() if e.name.startswith("model.layers.5.")
    )


def test_what_ranks_share_by_columns_is_read_whole_and_told() -> None:
    plan = small_plan()
    assert count_needed_bytes(plan) == count_read_bytes(plan) and " times the " not in show_plan(plan)
    half = small_plan(layout=Layout(2, 2, 0))  # whole experts: o_proj and other down_proj are shared by columns
    by_columns = {s.source for s in half.steps if s.take[-1] != (0, plan.index.entries[s.source].shape[-1])}
    assert {name.rsplit(".", 2)[1] for name in by_columns} == {"o_proj", "down_proj"}
    wasted = sum(e.stop - e.start for e in plan.index.entries.values() if e.name in by_columns) / 2
    assert count_read_bytes(half) - count_needed_bytes(half) == wasted
    assert f"{count_read_bytes(half) / count_needed_bytes(half):.2f} times the" in show_plan(half)


def test_rows_needed_reach_from_the_first_row_to_the_last() -> None:
    def step(first: int, last: int, view: tuple[int, ...] | None = None) -> LoadStep:
        return LoadStep("p", ((0, 1), (0, 8)), "copy", "t", ((first, last), (0, 8)), view)

    entries = {"t": Entry("t", "BF16", (90, 8), "f", 0, 1440)}
    for steps in ([step(10, 20), step(30, 40)], [step(30, 40), step(10, 20)], [step(10, 40), step(20, 30)]):
        assert rows_needed(steps, entries) == {"t": (10, 40)}
    assert rows_needed([step(2, 4, (9, 10, 8))], entries) == {"t": (20, 40)}  # heads 2 and 3, of ten rows each


def test_what_may_wait_is_what_gets_dequantised() -> None:
    plan = small_plan()
    entries = plan.index.entries.values()
    upcast = [e for e in entries if e.dtype == "F8_E4M3" and e.name.split(".")[-2] in ("wk", "kv_b_proj")]
    assert len(upcast) == 6 + 4  # kv_b_proj in all layers, wk in the full ones
    assert count_waiting_bytes(plan) == sum(e.stop - e.start for e in upcast)


@pytest.mark.parametrize("mtp", [True, False])
def test_an_index_key_takes_256_or_132_bytes(mtp: bool) -> None:
    plan = small_plan(mtp=mtp)
    c = plan.config
    layers = c.num_hidden_layers + mtp
    keys, latent = sum(c.has_indexer(i) for i in range(layers)), c.kv_lora_rank + c.qk_rope_head_dim
    assert 0 < keys < layers and c.index_head_dim == 128
    assert plan_json(plan)["cache_token_bytes"] == {
        "bf16": layers * latent * 2 + keys * 256,
        "fp8": layers * latent * 2 + keys * 132,
    }
    assert "index keys in FP8" in show_plan(plan, index_cache="fp8")


def test_a_latent_takes_half_the_bytes_and_its_rope_stays() -> None:
    """512 + 64 numbers: 1,152 bytes in BF16; codes, a scale and 64 numbers are 644."""
    row = LayerCache(576, rope=64)
    assert [count_token_bytes([row], "auto", latent_cache=how) for how in ("bf16", "fp8")] == [1152, 644]
    assert count_token_bytes([row], "float32", latent_cache="fp8") == 512 + 4 + 256
    assert count_token_bytes([LayerCache(512), LayerCache()], "auto", latent_cache="fp8") == 516
    plan = small_plan()
    c, layers = plan.config, plan.config.num_hidden_layers + 1
    told, saved = plan_json(plan), layers * (c.kv_lora_rank - 4)
    for how, size in told["cache_token_bytes"].items():
        assert told["fp8_latents_token_bytes"][how] == size - saved
    assert "latents in FP8, index keys in BF16" in show_plan(plan, latent_cache="fp8")


def test_json_holds_the_whole_plan() -> None:
    plan = small_plan()
    data = json.loads(json.dumps(plan_json(plan)))
    assert [p["name"] for p in data["parameters"]] == list(plan.stored)
    assert sum(len(p["steps"]) for p in data["parameters"]) == len(plan.steps)
    fused = next(p for p in data["parameters"] if p["name"] == "model.layers.0.self_attn.indexer.wk_weights_proj")
    wk, weights = fused["steps"]
    assert (wk["op"], wk["scale"], wk["group"]) == ("dequantize", wk["source"] + "_scale_inv", [128, 128])
    assert (weights["op"], weights["put"]) == ("copy", [[128, 160], [0, 6144]])
    source = data["sources"][wk["source"]]
    assert (source["dtype"], source["stop"] - source["start"]) == ("F8_E4M3", 128 * 6144)


def test_json_holds_the_problems() -> None:
    name = "model.layers.0.self_attn.o_proj.weight"
    data = plan_json(small_plan(**{name: (1, 2)}))
    assert ("shape", name) in [(p["kind"], p["name"]) for p in data["problems"]]


def test_explain_names_files_bytes_and_scale_of_each_part() -> None:
    plan = small_plan()
    name = "model.layers.0.self_attn.indexer.wk_weights_proj"
    text = explain(plan, name)
    for source in ("wk.weight", "wk.weight_scale_inv", "weights_proj.weight"):
        entry = plan.index.entries[f"model.layers.0.self_attn.indexer.{source}"]
        assert f"{entry.name}" in text
        assert f"in model.safetensors, bytes {entry.start:,} to {entry.stop:,}" in text
    assert f"{name}[0:128]" in text and f"{name}[128:160]" in text
    assert "held as BF16 [160, 6144], 1,966,080 bytes" in text
    assert "128x128" in text


def test_explain_of_a_parameter_kept_in_fp8_shows_its_scales() -> None:
    plan = small_plan()
    text = explain(plan, "model.layers.0.self_attn.qkv_a_proj")
    assert "held as FP8 128x128 [2624, 6144]" in text
    assert "with scales F32 [21, 48] in model.layers.0.self_attn.qkv_a_proj.scale" in text
    for name in ("q_a_proj", "kv_a_proj_with_mqa"):
        assert f"from  model.layers.0.self_attn.{name}.weight_scale_inv\n" in text
    assert "qkv_a_proj.scale[16:21]" in text  # 576 rows are 4.5 blocks


def test_explain_folds_the_parts_of_many_experts() -> None:
    config = deepseek_v32_config()
    plan = make_plan(ModelConfig.from_dict(config), headers(config))
    text = explain(plan, "model.layers.60.mlp.experts.down_proj")
    assert "made of 256 parts" in text
    assert "model.layers.60.mlp.experts.{4-255}.down_proj.weight" in text
    assert len(text.splitlines()) < 50


def test_explain_says_where_a_tensor_goes() -> None:
    plan = small_plan()
    text = explain(plan, "model.layers.4.mlp.experts.3.up_proj.weight")
    assert "model.layers.4.mlp.experts.gate_up_proj[3:4, 2048:4096]" in text
    assert explain(plan, "model.layers.4.mlp.experts.3.up_proj") == text  # .weight may be left out
    text = explain(plan, "model.layers.4.self_attn.kv_b_proj.weight_scale_inv")
    assert "is the scale of model.layers.4.self_attn.kv_b_proj.weight" in text
    text = explain(small_plan(mtp=False), "model.layers.5.enorm.weight")
    assert "is not read: the MTP layer was not asked for" in text
    text = explain(small_plan(Layout(2, 2, 0)), "model.layers.4.mlp.experts.3.up_proj.weight")
    assert "is not read: this rank has no use for it" in text


def test_explain_of_an_unknown_name_offers_near_ones() -> None:
    with pytest.raises(PlanError, match=r"did you mean model\.layers\.0\.self_attn\.indexer\.wk_weights_proj"):
        explain(small_plan(), "model.layers.0.self_attn.indexer.wk_weight_proj")


def test_explain_of_a_parameter_that_cannot_be_made_says_what_it_needs() -> None:
    plan = small_plan(**{"model.layers.0.self_attn.indexer.wk.weight_scale_inv": None})
    text = explain(plan, "model.layers.0.self_attn.indexer.wk_weights_proj")
    assert "cannot be made" in text and "indexer.wk.weight [128, 6144]" in text
    assert "wk_weights_proj" in show_plan(plan)  # still in the table


def test_alike_problems_are_one_line_with_their_count() -> None:
    lost = {f"model.layers.{i}.mlp.experts.{e}.up_proj.weight": None for i in (3, 4) for e in range(4)}
    problems = prove(small_plan(**lost))
    lines = show_problems(problems).splitlines()
    (line,) = (line for line in lines if line.startswith("missing:"))
    assert line.startswith("missing: model.layers.{3-4}.mlp.experts.{0-3}.up_proj.weight (8 of them) is not")


def test_problems_that_differ_in_more_than_numbers_stay_apart() -> None:
    problems = [
        Problem("shape", "a.1", "has shape [4, 8]"),
        Problem("shape", "a.2", "has shape [6, 8]"),
        Problem("shape", "a.3", "has another shape"),
        Problem("dtype", "a.4", "has shape [4, 8]"),
    ]
    assert show_problems(problems).splitlines() == [
        "shape: a.{1-2} (2 of them) has shape [{4,6}, 8]",
        "shape: a.3 has another shape",
        "dtype: a.4 has shape [4, 8]",
    ]


def test_a_thousand_different_problems_print_forty_lines() -> None:
    names = [f"tensor_{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(500)]
    problems = [Problem("missing", f"{name}.{i}", "is not there") for name in names for i in range(2)]
    lines = show_problems(problems).splitlines()
    assert len(lines) == 41
    assert lines[-1] == "and 920 more"
    assert len(show_problems(problems, limit=None).splitlines()) == 500


def test_bytes_are_shown_with_three_digits() -> None:
    shown = [show_bytes(n) for n in (0, 999, 1000, 1234, 12345, 999_499, 999_500, 689_469_018_240)]
    assert shown == ["0 B", "999 B", "1.00 kB", "1.23 kB", "12.3 kB", "999 kB", "1.00 MB", "689 GB"]
    assert all(a != b for a, b in pairwise(shown))
