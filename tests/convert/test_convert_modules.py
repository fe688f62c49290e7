"""Which modules a user's words mean, and a warning where engines build as one what is no longer alike."""

from pathlib import Path

import pytest
from published_configs import FP8 as BLOCK
from safetensors.torch import load_file
from small_checkpoints import small_config, write_small
from torch import Tensor

from saccade.checkpoint.index import Entry
from saccade.cli.convert import show_conversion
from saccade.convert.changes import Mode, OutputTensor
from saccade.convert.configs import find_plain
from saccade.convert.convert import convert
from saccade.convert.modules import explain_splits, is_matched

INDEXER = "model.layers.{}.self_attn.indexer."


@pytest.mark.parametrize(
    ("module", "pattern", "expected"),
    [
        ("model.layers.1.self_attn.indexer.wk", "indexer.wk", True),
        ("model.layers.1.self_attn.indexer.wk", "wk", True),
        ("model.layers.1.self_attn.indexer.wk", "model.layers.1.self_attn.indexer.wk", True),
        ("model.layers.1.self_attn.indexer.wk", "layers.?.self_attn.indexer.*", True),
        ("model.layers.1.self_attn.indexer.wk2", "indexer.wk", False),
        ("model.layers.1.self_attn.xindexer.wk", "indexer.wk", False),
        ("model.layers.1.self_attn.indexer.wk", "self_attn", True),
        ("model.layers.1.self_attn.indexer.wk", "model.layers.1", True),
        ("model.layers.1.self_attn.indexer.wk", "model", True),
        ("model.layers.1.self_attn.indexer.wk", "*", True),
        ("model.layers.1.self_attn.indexer.wk", "indexer.wk.weight", True),
        ("model.layers.1.self_attn.indexer.wk", "indexer.wk.weight_scale_inv", True),
        ("model.layers.1.self_attn.indexer.wk", "indexer.wk.bias", False),
        ("model.layers.1.self_attn.indexer.wk", "attn", False),
        ("model.layers.11.self_attn.indexer.wk", "layers.1", False),
        ("model.layers.1.self_attn.indexers_proj", "indexer", False),
    ],
)
def test_patterns_name_modules_their_parents_and_their_tensors(module: str, pattern: str, expected: bool) -> None:
    assert is_matched(module, [pattern]) is expected


@pytest.mark.parametrize(
    ("patterns", "upcast"),
    [
        (("model.layers.1.self_attn.indexer.wk.weight",), {INDEXER.format(1) + "wk"}),
        (("model.layers.1.self_attn.indexer",), {INDEXER.format(1) + "wk", INDEXER.format(1) + "wq_b"}),
        (("indexer",), {INDEXER.format(i) + leaf for i in range(4) for leaf in ("wk", "wq_b")}),
        (("layers.?.self_attn.indexer.wk.weight",), {INDEXER.format(i) + "wk" for i in range(4)}),
        (("layers.0.*.wk", "layers.2.*.wk"), {INDEXER.format(0) + "wk", INDEXER.format(2) + "wk"}),
    ],
)
def test_a_tensor_or_a_parent_names_what_a_user_expects(
    patterns: tuple[str, ...], upcast: set[str], fp8_tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    write_small(tmp_path / "m", small_config(), fp8_tensors)
    convert(tmp_path / "m", tmp_path / "out", Mode("upcast", patterns))
    before, after = fp8_tensors, load_file(tmp_path / "out" / "model-00001-of-00001.safetensors")
    assert {n.removesuffix(".weight") for n in after if after[n].dtype != before[n].dtype} == upcast
    assert before.keys() - after.keys() == {f"{module}.weight_scale_inv" for module in upcast}


FUSED = [
    (("mlp.gate_proj",), "model.layers.0.mlp.gate_proj: plain now, but up_proj beside", "--upcast mlp.up_proj"),
    (("layers.0.mlp.up_proj.weight",), "but gate_proj beside it", "--upcast layers.0.mlp.gate_proj"),
    (("q_a_proj",), "model.layers.{0-3}.self_attn.q_a_proj: plain", "--upcast kv_a_proj_with_mqa"),
    (
        ("layers.2.*.kv_a*",),
        "model.layers.2.self_attn.kv_a_proj_with_mqa: ",
        "--upcast model.layers.2.self_attn.q_a_proj",
    ),
    (
        ("shared_experts.g*",),
        "{1-3}.mlp.shared_experts.gate_proj: plain",
        "--upcast shared_experts.gate_proj --upcast shared_experts.up_proj",
    ),
    (
        ("layers.[12].*q_a_*",),
        "model.layers.{1-2}.self_attn.q_a_proj: plain",
        "--upcast self_attn.kv_a_proj_with_mqa --upcast self_attn.q_a_proj",
    ),
    (("layers.1.mlp.experts.0",), "model.layers.1.mlp.experts: plain now in part", "--upcast layers.1.mlp.experts"),
    (("mlp.experts.*.gate_proj",), "model.layers.{1-3}.mlp.experts: plain now in part", "--upcast mlp.experts"),
]


@pytest.mark.parametrize(("patterns", "words", "cure"), FUSED)
def test_what_splits_a_fused_module_is_said_with_its_cure(
    patterns: tuple[str, ...], words: str, cure: str, fp8_tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    write_small(tmp_path / "m", small_config(quantization_config=BLOCK), fp8_tensors)
    report = convert(tmp_path / "m", tmp_path / "out", Mode("upcast", patterns))
    (warning,) = report.warnings
    assert words in warning and warning.endswith(f"add {cure}") and "\n" not in warning
    assert f"warning                {warning}\n" in show_conversion(report, None)
    more = (*patterns, *cure.split()[1::2])
    assert convert(tmp_path / "m", tmp_path / "cured", Mode("upcast", more)).warnings == ()


def test_what_engines_build_alone_is_upcast_without_a_warning(fp8_tensors: dict[str, Tensor], tmp_path: Path) -> None:
    write_small(tmp_path / "m", small_config(quantization_config=BLOCK), fp8_tensors)
    for i, pattern in enumerate(
        ("indexer.wk", "indexer", "layers.0.mlp.down_proj", "o_proj", "mlp.experts", "layers.3")
    ):
        assert convert(tmp_path / "m", tmp_path / f"{i}", Mode("upcast", (pattern,))).warnings == ()


def test_a_quantised_weights_proj_beside_a_plain_wk_is_said() -> None:
    wk, proj = INDEXER.format(3) + "wk", INDEXER.format(3) + "weights_proj"
    (line,) = explain_splits({wk}, {proj}, ["indexer.wk"])
    assert line.startswith(f"{wk}: plain now, but weights_proj") and line.endswith("add --upcast indexer.weights_proj")
    assert explain_splits({wk, proj}, set(), ["indexer"]) == [] == explain_splits({wk}, set(), ["indexer"])


def test_the_cure_reaches_every_layer_whose_experts_are_split() -> None:
    names = [f"model.layers.{layer}.mlp.experts.{i}.up_proj" for layer in (3, 4) for i in range(2)]
    for patterns, cure in ((["layers.3.mlp.experts.0", "up_proj"], "mlp.experts"), (["experts.0"], "experts")):
        (line,) = explain_splits(names[::2], names[1::2], patterns)
        assert line.startswith("model.layers.{3-4}.mlp.experts: ") and line.endswith(f"add --upcast {cure}")


def test_names_in_lists_and_lines_are_sorted_by_number() -> None:
    names = [f"layers.{i}.self_attn.q_a_proj" for i in (10, 2, 1)]
    (line,) = explain_splits(names, [n.replace("q_a_proj", "kv_a_proj_with_mqa") for n in names], ["q_a_proj"])
    assert line.startswith("layers.{1-2,10}.self_attn.q_a_proj:")
    source = Entry("", "BF16", (2, 2), "f", 0, 8)
    found = find_plain(
        [OutputTensor(f"{n}.weight", "BF16", (2, 2), "dequantize", source, None) for n in names], "model.layers.61."
    )
    assert found.new == found.all == tuple(reversed(names))
