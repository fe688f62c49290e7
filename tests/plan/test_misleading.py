"""Names, exclude lists and files that misled other engines: each loads exactly as stored, or is refused by name.

"Exactly" is tests/helpers/oracles/exact_load.py: every parameter, bit for bit, against an independent decode of the files. "Refused" is
before a tensor byte is read. Which row of the survey each test answers stands in test_survey.py.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from changed_checkpoints import CONFIG
from exact_load import compare
from plans import plan_of, problems_of
from safetensors.torch import save_file
from small_checkpoints import small_tensors, write_small
from torch import Tensor

from saccade.checkpoint.open import open_model
from saccade.errors import CheckpointError
from saccade.plan import Plan, make_plan, prove
from saccade.weights.loader import load

Tensors = dict[str, Tensor]

INDEXER = "self_attn.indexer."


def stored(**changes: object) -> Tensors:
    """The published FP8 layout, with scales that make a dropped or a floored one visible."""
    return small_tensors(CONFIG | changes, seed=3, power_of_two=False)


def load_exactly(root: Path) -> Plan:
    plan = plan_of(root)
    assert prove(plan) == []
    compare(root, plan)
    compare(root, make_plan(plan.config, plan.index, dtype="float32"))
    return plan


def to_bf16(t: Tensors, *marks: str) -> Tensors:
    """The matrices whose name has one of the marks become BF16, without a scale."""
    hits = {n for n in t if any(mark in n for mark in marks)}
    assert hits
    kept = {n: w.float().bfloat16() if n in hits else w for n, w in t.items()}
    return {n: w for n, w in kept.items() if not (n in hits and n.endswith("_scale_inv"))}


# What quantization_config says in the wild. No block names what these files hold, and several name what no file has.
GLOBS = [f"model.layers.{i}.self_attn*" for i in range(3)]
BLOCKS: dict[str, object] = {
    "DeepSeek-V3.2": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "scale_fmt": "ue8m0"},
    "GLM-5-FP8, indexers_proj": {"quant_method": "fp8", "modules_to_not_convert": ["lm_head", "model.layers.0.self_attn.indexers_proj"]},
    "wk said to be kept": {"quant_method": "fp8", "modules_to_not_convert": ["model.layers.1.self_attn.indexer.wk"]},
    "weights_proj not said to be kept": {"quant_method": "fp8", "modules_to_not_convert": []},
    "another block size": {"quant_method": "fp8", "weight_block_size": [1, 32]},
    "static activations": {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": [128, 128]},
    "ModelOpt, exclude_modules": {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16, "exclude_modules": GLOBS},
    "ModelOpt, ignore": {"quant_algo": "NVFP4", "ignore": GLOBS},
    "Quark, runtime prefix of the MTP layer": {"quant_method": "quark", "exclude": ["model.decoder.*", "*mlp.gate"], "global_quant_config": {"weight": "mxfp4"}},
    "Quark, shared experts not excluded": {"quant_method": "quark", "exclude": ["*self_attn*", "lm_head"]},
    "compressed-tensors, any name of a group": {"quant_method": "compressed-tensors", "config_groups": {"experts": {"weights": {"num_bits": 4}}}, "ignore": ["re:.*indexer.*"]},
    "of no known method": {"quant_method": "???"},
    "of another type": ["fp8"],
}  # fmt: skip


@pytest.fixture(scope="module")
def plain_plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    return load_exactly(write_small(tmp_path_factory.mktemp("plain"), CONFIG, stored()))


@pytest.mark.parametrize("block", BLOCKS)
def test_what_quantization_config_says_changes_no_step(block: str, plain_plan: Plan, tmp_path: Path) -> None:
    root = write_small(tmp_path, CONFIG | {"quantization_config": BLOCKS[block]}, stored())
    (root / "hf_quant_config.json").write_text(json.dumps({"quantization": BLOCKS[block]}))
    (root / "quant_model_description.json").write_text(json.dumps({"model.layers.1.mlp.gate.weight": "W8A8"}))
    plan = load_exactly(root)
    assert (plan.steps, plan.stored) == (plain_plan.steps, plain_plan.stored)


MIXED: dict[str, tuple[str, ...]] = {  # what is BF16 in a checkpoint that is FP8 elsewhere
    "shared experts beside FP8 routed ones": ("shared_experts.",),
    "the MTP layer": ("model.layers.2.",),
    "all attention and indexers": ("self_attn.",),
    "the indexer and kv_b_proj, as in GLM-5.3-Flash": (INDEXER, "kv_b_proj"),
    "wk alone": (INDEXER + "wk.",),
    "one half of each fused matrix": ("q_a_proj", "up_proj"),
    "every second expert": ("experts.0.",),
    "wk of the MTP layer alone": ("model.layers.2." + INDEXER + "wk.",),
}  # fmt: skip


@pytest.mark.parametrize("case", MIXED)
def test_each_tensor_is_taken_as_it_is_stored_whatever_its_neighbours_are(case: str, tmp_path: Path) -> None:
    tensors = to_bf16(stored(), *MIXED[case])
    plan = load_exactly(write_small(tmp_path, CONFIG, tensors, shard_of=lambda n: len(n) % 3))
    fused = [s.dtype for name, s in plan.stored.items() if name.endswith("wk_weights_proj")]
    assert fused == ["BF16"] * 3


def every(change: Callable[[str], str]) -> Callable[[Tensors], Tensors]:
    return lambda t: {change(n): w for n, w in t.items()}


def stack_experts(t: Tensors) -> Tensors:
    """As transformers 5 saves them: experts.gate_up_proj [experts, 2 * width, hidden] and experts.down_proj."""
    kept = {n: w for n, w in t.items() if ".mlp.experts." not in n}
    for x in ("model.layers.1.mlp.experts.", "model.layers.2.mlp.experts."):
        halves = [[t[f"{x}{e}.{p}_proj.weight"].float().bfloat16() for p in ("gate", "up")] for e in range(2)]
        kept[x + "gate_up_proj"] = torch.stack([torch.cat(pair) for pair in halves])
        kept[x + "down_proj"] = torch.stack([t[f"{x}{e}.down_proj.weight"].float().bfloat16() for e in range(2)])
    return kept


def rename_mtp(t: Tensors) -> Tensors:
    return {n.replace("model.layers.2.", "model.mtp_layers.0."): w for n, w in t.items()}


def to_awq(t: Tensors) -> Tensors:
    """AWQ: no `.weight` at all, but qweight, qzeros and scales."""
    kept = dict(t)
    for name in [n for n in t if n.endswith("down_proj.weight")]:
        x, (rows, columns) = name.removesuffix("weight"), t[name].shape
        del kept[name], kept[name + "_scale_inv"]
        kept[x + "qweight"] = torch.zeros(columns, rows // 8, dtype=torch.int32)
        kept[x + "qzeros"] = torch.zeros(-(-columns // 128), rows // 8, dtype=torch.int32)
        kept[x + "scales"] = torch.ones(-(-columns // 128), rows, dtype=torch.float16)
    return kept


WK1 = "model.layers.1." + INDEXER + "wk.weight"
NAMES: dict[str, tuple[Callable[[Tensors], Tensors], str, str]] = {  # change; a name that is missing; one that nobody reads
    "names without `model.`": (every(lambda n: n.removeprefix("model.")), WK1, WK1.removeprefix("model.")),
    "names with `language_model.`": (every(lambda n: n.replace("model.", "model.language_model.", 1)), WK1, WK1.replace("model.", "model.language_model.", 1)),
    "MTP layer under another name": (rename_mtp, "", "model.mtp_layers.0.eh_proj.weight"),
    "MTP layer with a runtime prefix": (every(lambda n: n.replace("model.layers.2.", "model.decoder.")), "", "model.decoder.eh_proj.weight"),
    "stacked experts": (stack_experts, "model.layers.1.mlp.experts.0.up_proj.weight", "model.layers.1.mlp.experts.gate_up_proj"),
    "indexers_proj": (every(lambda n: n.replace("weights_proj", "indexers_proj")), WK1.replace("wk", "weights_proj"), WK1.replace("wk", "indexers_proj")),
    "a fused wk_weights_proj": (every(lambda n: n.replace("weights_proj", "wk_weights_proj")), WK1.replace("wk", "weights_proj"), WK1.replace("wk", "wk_weights_proj")),
    "AWQ": (to_awq, "model.layers.1.mlp.experts.1.down_proj.weight", "model.layers.1.mlp.experts.0.down_proj.weight"),
    "a bias of weights_proj": (lambda t: t | {WK1.replace("wk.weight", "weights_proj.bias"): torch.ones(4)}, "", WK1.replace("wk.weight", "weights_proj.bias")),
    "a scale of a kept weight": (lambda t: t | {"lm_head.weight_scale_inv": torch.ones(1, 2)}, "", "lm_head.weight_scale_inv"),
}  # fmt: skip


@pytest.mark.parametrize("case", NAMES)
def test_names_that_the_model_does_not_have_are_never_skipped(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, missing, unread = NAMES[case]
    tensors = change(stored())
    problems = problems_of(write_small(tmp_path, CONFIG, tensors), monkeypatch)
    named = {p.name for p in problems}
    assert unread in named and (not missing or missing in named), named
    known = stored().keys()  # of the others none is lost in silence: it is named, or the matrix beside which it stands
    strangers = {n for n in tensors if n not in known and not n.endswith("_scale_inv")}
    assert [n for n in strangers if n not in named and n.rpartition(".")[0] + ".weight" not in named] == []


def test_a_matrix_kept_without_its_bias_needs_none(tmp_path: Path) -> None:
    """A BF16 checkpoint of DeepSeek-V3.2 has no weights_proj.bias; nothing waits for one."""
    tensors = to_bf16(stored(), "proj", ".wk", ".wq_b")
    plan = load_exactly(write_small(tmp_path, CONFIG, tensors))
    assert {s.dtype for s in plan.stored.values()} == {"BF16", "F32"}
    assert not any("weights_proj.bias" in name for name in plan.stored)


def test_an_mtp_layer_in_a_file_that_no_index_lists_is_loaded(tmp_path: Path) -> None:
    mine = {n: w for n, w in stored().items() if n.startswith("model.layers.2.")}
    root = write_small(tmp_path, CONFIG, {n: w for n, w in stored().items() if n not in mine})
    assert any("declares an MTP layer" in note for note in plan_of(root).notes)  # without it: said, not made up
    save_file(mine, root / "mtp.safetensors")
    plan = load_exactly(root)
    assert "model.layers.2.eh_proj" in plan.stored and any("mtp.safetensors" in note for note in plan.notes)


def test_half_of_an_mtp_layer_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = [n for n in stored() if n.startswith("model.layers.2.mlp.experts.1.")]
    root = write_small(tmp_path, CONFIG, {n: w for n, w in stored().items() if n not in mine})
    assert {p.name for p in problems_of(root, monkeypatch)} == {n for n in mine if not n.endswith("_scale_inv")}


def test_an_mtp_layer_without_embedding_and_head_uses_the_main_ones(tmp_path: Path) -> None:
    tensors = small_tensors(CONFIG, seed=3, mtp_copies=False)
    plan = load_exactly(write_small(tmp_path, CONFIG, tensors))
    assert not any(n.endswith((".embed_tokens", "shared_head.head")) and "layers" in n for n in plan.stored)
    assert any("main embedding and head" in note for note in plan.notes)


@pytest.mark.parametrize("ships", [False, True])
def test_layers_that_share_a_selection_load_with_and_without_an_indexer_in_the_file(
    ships: bool, tmp_path: Path
) -> None:
    config = CONFIG | {"model_type": "glm_moe_dsa", "indexer_types": ["full", "shared"]}
    plan = load_exactly(write_small(tmp_path, config, stored() if ships else small_tensors(config)))
    assert {n.split(".")[2] for n in plan.stored if "indexer" in n} == {"0", "2"}  # 2 is the MTP layer
    ignored = {i.name for i in plan.ignored}
    assert ignored == ({n for n in stored() if n.startswith("model.layers.1." + INDEXER)} if ships else set())


def test_copies_in_folders_and_stale_lists_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = stored()
    root = write_small(tmp_path, CONFIG, tensors)
    other = {n: torch.zeros_like(w) for n, w in tensors.items()}
    write_small(root / "original", CONFIG, other)
    save_file(other, root / "copy.safetensors")  # not listed, and only repeats what is
    plan = load_exactly(root)
    assert {e.file for e in plan.index.entries.values()} == {"model-00001-of-00001.safetensors"}
    (root / "model.safetensors.index.json").unlink()
    assert {p.kind for p in problems_of(root, monkeypatch)} == {"duplicate"}  # now nothing says which is meant


def test_a_gguf_is_not_taken_for_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(100))
    for path in (tmp_path, tmp_path / "model.gguf"):
        with pytest.raises(CheckpointError, match=r"GGUF and not supported; expected \.safetensors files"):
            open_model(path)


def test_ragged_scales_reach_the_last_row(tmp_path: Path) -> None:
    """kv_a_proj_with_mqa has 160 rows, 1.25 blocks: its last 32 rows have a scale of their own."""
    tensors, name = stored(), "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
    assert tensors[name].shape[0] == 160
    tensors[name + "_scale_inv"][1] *= 2**20
    held = load(load_exactly(write_small(tmp_path, CONFIG, tensors))).held
    fused, scale = held["model.layers.0.self_attn.qkv_a_proj"], held["model.layers.0.self_attn.qkv_a_proj.scale"]
    assert fused.shape[0] == 128 + 160 and scale.shape[0] == 3
    assert torch.equal(scale[1:], tensors[name + "_scale_inv"]) and (scale[2] > 2**10).all() and (scale[1] < 1).all()
