"""Full-size plans: complete, exact about bytes, short when printed; and a wrong slice of one rank is found."""

import gc
import math
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
from header_checkpoints import published, write_headers
from published_configs import deepseek_v32_config, glm5_config, glm52_config
from small_checkpoints import small_config, small_tensors, write_small

from saccade.checkpoint.coding import Coding
from saccade.checkpoint.encoding import ENCODINGS, FP8_BLOCKS
from saccade.checkpoint.index import Index, read_index
from saccade.errors import PlanError
from saccade.models.dsa.config import ModelConfig
from saccade.models.parameters import Param
from saccade.plan import Layout, Plan, check, check_sources, make_plan, plan_ranks, prove
from saccade.plan.check import find_tiling_fault
from saccade.plan.show import show_plan

MODELS = {  # tensors as published: survey, A2
    "DeepSeek-V3.2": (deepseek_v32_config, True, 92425),
    "GLM-5-FP8": (glm5_config, False, 119028),
    "GLM-5.2-FP8": (glm52_config, False, 118629),
}
# GLM-5 has the indexers of DeepSeek-V3.2 and all else of GLM-5.2: `make soak` proves it.
ASKED = ["DeepSeek-V3.2", pytest.param("GLM-5-FP8", marks=pytest.mark.soak), "GLM-5.2-FP8"]
# One layer of each kind is enough where 16 ranks are proven: three dense layers, three sparse ones and the MTP layer.
CUT = " of six layers"
Read = Callable[[str], tuple[ModelConfig, Index]]


@pytest.fixture(scope="module", autouse=True)
def no_collector() -> Iterator[None]:
    """16 plans are 5 million tuples: walking them again and again takes longer than making them."""
    gc.disable()
    yield
    gc.enable()


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Read:
    """Each model is read when a test asks for it: 1 s for each process that runs some of these tests."""

    @cache
    def read(name: str) -> tuple[ModelConfig, Index]:
        make, copies, _ = MODELS[name.removesuffix(CUT)]
        config = make() | ({"num_hidden_layers": 6} if name.endswith(CUT) else {})
        root = write_headers(tmp_path_factory.mktemp("full"), config, published(config, copies))
        return ModelConfig.load(root), read_index(root)

    return read


@pytest.fixture(scope="module")
def whole(full: Read) -> Callable[[str], Plan]:
    """The plan of one rank for a whole model, made once."""
    return cache(lambda name: make_plan(*full(name)))


@pytest.mark.parametrize("name", ASKED)
def test_a_published_model_is_proven_complete_and_prints_short(
    name: str, full: Read, whole: Callable[[str], Plan]
) -> None:
    plan = whole(name)
    assert len(full(name)[1].entries) == MODELS[name][2]
    assert prove(plan) == []
    text = show_plan(plan)
    assert len(text.splitlines()) < 60, text
    assert "wk_weights_proj" in text


@pytest.mark.parametrize("name", ASKED)
def test_bytes_on_the_device_are_the_files_plus_what_upcasting_adds(
    name: str, full: Read, whole: Callable[[str], Plan]
) -> None:
    plan, (_, index) = whole(name), full(name)
    expected = sum(e.stop - e.start for e in index.entries.values())
    for e in index.entries.values():
        if e.dtype == "F8_E4M3" and e.name.split(".")[-2] in ("wk", "kv_b_proj"):  # FP8 -> BF16, and the scale goes
            scale = index.entries[e.name + "_scale_inv"]
            expected += math.prod(e.shape) - (scale.stop - scale.start)
        if e.dtype == "BF16" and len(e.shape) == 1:  # norms -> F32
            expected += 2 * math.prod(e.shape)
    assert plan.device_bytes == expected


def test_wk_weights_proj_is_one_bf16_parameter_in_every_layer(whole: Callable[[str], Plan]) -> None:
    for name, layers, shape in (
        ("DeepSeek-V3.2", range(62), (192, 7168)),
        ("GLM-5.2-FP8", [0, 1, 2, *range(6, 78, 4), 78], (160, 6144)),
    ):
        stored = whole(name).stored
        fused = {n: (s.dtype, s.shape) for n, s in stored.items() if n.endswith("wk_weights_proj")}
        assert fused == {f"model.layers.{i}.self_attn.indexer.wk_weights_proj": ("BF16", shape) for i in layers}


@pytest.mark.parametrize(
    ("tp", "ep", "layers"),
    [(8, False, " of six layers"), (8, True, ""), (16, False, " of six layers"), (16, True, " of six layers")],
)
def test_all_ranks_of_a_model_are_proven_together(
    tp: int, ep: bool, layers: str, full: Read, whole: Callable[[str], Plan]
) -> None:
    single = whole("DeepSeek-V3.2" + layers)
    config, index = full("DeepSeek-V3.2" + layers)
    plans = plan_ranks(config, index, [Layout(tp, tp if ep else 1, rank) for rank in range(tp)])
    assert [problem for plan in plans for problem in check(plan)] == []
    assert check_sources(plans) == []
    for name, stored in single.stored.items():
        parts = [p.stored[name].nbytes for p in plans]
        replicated = not any(
            mark in name
            for mark in ("q_b_proj", "w_u", "o_proj", "gate_up", "down_proj", "embed", "head.head", "lm_head")
        )
        assert sum(parts) == stored.nbytes * (tp if replicated else 1), name
        assert replicated is (parts[0] == stored.nbytes), name


@pytest.mark.parametrize("name", ASKED[1:])
def test_the_ranks_of_glm_are_proven(name: str, full: Read) -> None:
    config, index = full(name)
    assert prove(make_plan(config, index, Layout(8, 8))) == []


def test_a_wrong_slice_of_one_rank_is_found(tmp_path: Path) -> None:
    index = read_index(write_small(tmp_path, small_config(), small_tensors(small_config())))
    config = ModelConfig.load(tmp_path)
    plans = [make_plan(config, index, Layout(4, 2, rank)) for rank in range(4)]
    assert check_sources(plans) == []
    for victim in ("self_attn.o_proj.weight", "mlp.experts.3.up_proj.weight", "self_attn.kv_b_proj.weight"):
        name = f"model.layers.1.{victim}"
        broken = list(plans)
        rank = next(r for r in (2, 1) if any(s.source == name for s in plans[r].steps))
        broken[rank] = with_shifted(plans[rank], name)
        found = check_sources(broken)
        assert name in [p.name for p in found], victim
        assert {p.name for p in found} <= {name, name + "_scale_inv"}, victim  # a dequantised slice reads its scales
        assert all(p.kind == "partly-read" and "nothing reads" in p.text for p in found)


def with_shifted(plan: Plan, source: str) -> Plan:
    """The plan with one tensor's slice moved to where another rank's begins."""
    from dataclasses import replace

    steps = []
    for s in plan.steps:
        if s.source == source:
            axis = next(a for a, (lo, _) in enumerate(s.take) if lo > 0 and not (s.view and a == 1))
            take = tuple((0, hi - lo) if a == axis else (lo, hi) for a, (lo, hi) in enumerate(s.take))
            s = s._replace(take=take)
        steps.append(s)
    return replace(plan, steps=tuple(steps))


def test_a_plan_that_does_not_tile_is_found(tmp_path: Path) -> None:
    from dataclasses import replace

    index = read_index(write_small(tmp_path, small_config(), small_tensors(small_config())))
    plan = make_plan(ModelConfig.load(tmp_path), index)
    fused = "model.layers.3.self_attn.indexer.wk_weights_proj"
    at = next(i for i, s in enumerate(plan.steps) if s.target == fused)
    for steps, fault in (
        (plan.steps[:at] + plan.steps[at + 1 :], "no source"),
        ((*plan.steps, plan.steps[at]), "overlap"),
        (
            (*plan.steps[:at], plan.steps[at]._replace(put=((60, 124), (0, 256))), *plan.steps[at + 1 :]),
            "out of bounds",
        ),
        ((*plan.steps[:at], plan.steps[at]._replace(take=((0, 63), (0, 256))), *plan.steps[at + 1 :]), "sizes differ"),
    ):
        found = check(replace(plan, steps=steps))
        assert {p.name for p in found} == {fused} and any(fault in p.text for p in found)


def test_tiling_faults() -> None:
    square = (((0, 2), (0, 2)), ((0, 2), (2, 4)), ((2, 4), (0, 4)))
    assert find_tiling_fault((4, 4), square) is None
    assert find_tiling_fault((4, 4), square[::-1]) is None
    assert "overlap" in str(find_tiling_fault((4, 4), (*square[:2], ((1, 4), (3, 4)))))
    assert "8 of 16" in str(find_tiling_fault((4, 4), square[:2]))
    assert "out of bounds" in str(find_tiling_fault((4, 4), (((0, 5), (0, 4)),)))
    assert "out of bounds" in str(find_tiling_fault((4, 4), (((2, 2), (0, 4)),)))


@pytest.mark.parametrize(("tp", "ep", "rank"), [(3, 1, 0), (8, 1, 0), (4, 3, 0), (2, 1, 2), (0, 1, 0), (16, 16, 0)])
def test_a_layout_that_cannot_be_is_refused_in_one_line(tmp_path: Path, tp: int, ep: int, rank: int) -> None:
    index = read_index(write_small(tmp_path, small_config(), small_tensors(small_config())))
    with pytest.raises(PlanError) as refusal:
        make_plan(ModelConfig.load(tmp_path), index, Layout(tp, ep, rank))
    assert len(str(refusal.value).splitlines()) == 1 and f"{(tp, ep)}"[1:2] in str(refusal.value)


def test_cutting_blocks_falls_back_to_bf16_and_says_what_it_costs(full: Read) -> None:
    plan = make_plan(*full("DeepSeek-V3.2"), Layout(32, 1, 0))  # experts: 64 of 2,048 rows, half a block
    name = "model.layers.3.mlp.experts.gate_up_proj"
    assert plan.stored[name].dtype == "BF16" and check(plan) == []
    assert [note for note in plan.notes if note.startswith(name)][0].count(f"+{256 * 2 * 64 * 7168} bytes") == 1
    assert "128x128 blocks" in show_plan(plan)


def test_shared_layers_may_or_may_not_ship_an_indexer(tmp_path: Path) -> None:
    shared = small_config(model_type="glm_moe_dsa", indexer_types=["full", "shared", "shared"])
    with_all = {k: v for k, v in shared.items() if k != "indexer_types"}
    for ships, config in ((False, shared), (True, with_all)):
        root = write_small(tmp_path / str(ships), shared, small_tensors(config))
        plan = make_plan(ModelConfig.load(root), read_index(root))
        assert prove(plan) == []
        indexers = {n.split(".")[2] for n in plan.stored if "indexer" in n}
        assert indexers == {"0", "3"}
        assert len(plan.ignored) == (14 if ships else 0)
        assert all("indexer_types" in i.reason for i in plan.ignored)


def test_the_mtp_layer_present_absent_declared_or_not_wanted(tmp_path: Path) -> None:
    tensors = small_tensors(small_config(), mtp_copies=False)
    silent = {k: v for k, v in small_config().items() if k != "num_nextn_predict_layers"}
    root = write_small(tmp_path / "undeclared", silent, tensors)
    plan = make_plan(ModelConfig.load(root), read_index(root))
    assert prove(plan) == [] and plan.mtp and "model.layers.3.eh_proj" in plan.stored
    assert any("main embedding and head" in note for note in plan.notes)

    off = make_plan(ModelConfig.load(root), read_index(root), mtp=False)
    assert prove(off) == [] and not any("layers.3." in n for n in off.stored)
    assert {i.reason for i in off.ignored} == {"the MTP layer was not asked for (mtp=False)"}

    without = {n: t for n, t in tensors.items() if not n.startswith("model.layers.3.")}
    root = write_small(tmp_path / "absent", small_config(), without)
    plan = make_plan(ModelConfig.load(root), read_index(root))
    assert prove(plan) == [] and any("declares an MTP layer" in note for note in plan.notes)

    partly = {n: t for n, t in tensors.items() if n != "model.layers.3.self_attn.indexer.weights_proj.weight"}
    root = write_small(tmp_path / "partly", small_config(), partly)
    problems = prove(make_plan(ModelConfig.load(root), read_index(root)))
    assert [p.name for p in problems] == ["model.layers.3.self_attn.indexer.weights_proj.weight"]


def test_plain_checkpoints_of_every_dtype_are_proven(tmp_path: Path) -> None:
    config = small_config()
    for dtype, router in (("BF16", "BF16"), ("F16", "F32"), ("F32", "F32")):
        specs = [(n, dtype, s) for n, _, s in published(config, True) if not n.endswith("scale_inv")]
        root = write_headers(tmp_path / dtype, config, specs)
        plan = make_plan(ModelConfig.load(root), read_index(root))
        assert prove(plan) == []
        assert {s.dtype for s in plan.stored.values()} == {"BF16", "F32"}
        assert plan.stored["model.layers.1.mlp.gate"].dtype == router
        assert {s.op for s in plan.steps} == {
            "BF16": {"copy", "widen"},
            "F16": {"round", "widen"},
            "F32": {"round", "copy"},
        }[dtype]


def test_e8m0_scales_are_widened(tmp_path: Path) -> None:
    specs = [(n, "F8_E8M0" if n.endswith("scale_inv") else d, s) for n, d, s in published(small_config(), True)]
    root = write_headers(tmp_path, small_config(), specs)
    plan = make_plan(ModelConfig.load(root), read_index(root))
    assert prove(plan) == []
    assert {s.op for s in plan.steps if s.source.endswith("o_proj.weight_scale_inv")} == {"widen"}


def test_the_table_declares_shapes_of_the_design(whole: Callable[[str], Plan]) -> None:
    params: dict[str, Param] = {p.name: p for p in whole("DeepSeek-V3.2").params}
    x = "model.layers.3."
    for name, shape in (
        (x + "self_attn.qkv_a_proj", (2112, 7168)),
        (x + "self_attn.w_uk", (128, 128, 512)),
        (x + "mlp.experts.gate_up_proj", (256, 4096, 7168)),
        ("model.layers.61.eh_proj", (7168, 14336)),
    ):
        assert params[name].shape == shape


@pytest.fixture(scope="module")
def small_plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    root = write_small(tmp_path_factory.mktemp("small"), small_config(), small_tensors(small_config()))
    return make_plan(ModelConfig.load(root), read_index(root))


X = "model.layers.1.self_attn."
KV_B = Coding(FP8_BLOCKS, (640, 416), X + "kv_b_proj.weight", X + "kv_b_proj.weight_scale_inv")
WRONG_STEPS: dict[str, tuple[str, dict[str, object], str]] = {  # target, what its first step is changed to, why
    "codes without their scale": (X + "w_uk", {"op": "copy", "coding": None}, "not an allowed cast"),
    "codes into floats": (X + "indexer.wk_weights_proj", {"op": "widen", "coding": None}, "allowed cast"),
    "another layer's scale": (X + "w_uv", {"coding": KV_B._replace(scale="model.layers.2.self_attn.kv_b_proj.weight_scale_inv")}, "are not the scales"),
    "another block size": (X + "w_uv", {"coding": KV_B._replace(encoding=ENCODINGS[1])}, "are not the scales"),
    "rows past the end": ("lm_head", {"take": ((1, 321), (0, 256))}, "not inside"),
    "columns past the end": ("lm_head", {"take": ((0, 320), (1, 257))}, "not inside"),
    "a norm past its end": ("model.norm.weight", {"take": ((1, 257),)}, "not inside"),
    "a view of another size": (X + "w_uk", {"view": (4, 161, 416)}, "cannot be seen"),
    "numbers multiplied by a scale": ("lm_head", {"op": "dequantize", "coding": Coding(FP8_BLOCKS, (320, 256), "lm_head.weight", X + "o_proj.weight_scale_inv")}, "not an allowed cast"),
    "codes of one matrix, scales of another": (X + "o_proj.scale", {"source": "model.layers.2.self_attn.o_proj.weight_scale_inv"}, "different tensors"),
    "a tensor that is not there": ("lm_head", {"source": "lm_head.bias"}, "does not exist"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG_STEPS)
def test_a_step_that_would_load_wrong_numbers_is_refused(wrong: str, small_plan: Plan) -> None:
    from dataclasses import replace

    target, changes, why = WRONG_STEPS[wrong]
    at = next(i for i, s in enumerate(small_plan.steps) if s.target == target)
    step = small_plan.steps[at]._replace(**changes)
    found = check(replace(small_plan, steps=(*small_plan.steps[:at], step, *small_plan.steps[at + 1 :])))
    assert any(p.kind == "step" and why in p.text for p in found), found
    assert check(small_plan) == []
