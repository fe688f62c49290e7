"""Which modules a converted model says are not quantised: for each engine, by its own way of matching names."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from published_configs import FP8 as BLOCK
from small_checkpoints import small_config, write_small

from saccade.cli.convert import show_conversion
from saccade.convert.changes import Mode
from saccade.convert.convert import convert

UPCAST, BF16, FP8 = Mode("upcast", ("indexer.wk",)), Mode("bf16"), Mode("fp8")
INDEXER = "model.layers.{}.self_attn.indexer."
WK = [INDEXER.format(i) + "wk" for i in range(4)]
PARTNERS = [INDEXER.format(i) + "weights_proj" for i in range(4)]
SGLANG = ["model.decoder.self_attn.indexer.wk", "model.decoder.self_attn.indexer.weights_proj"]
NEW = {*WK, *PARTNERS, *SGLANG}


def upcast(
    fp8_tensors: dict[str, torch.Tensor], root: Path, quantization: Any, files: dict[str, Any] | None = None
) -> Any:
    """quantization_config after the upcast of a model that had this one."""
    changes = {} if quantization is None else {"quantization_config": quantization}
    write_small(root / "m", small_config(**changes), fp8_tensors)
    for name, values in (files or {}).items():
        (root / "m" / name).write_text(json.dumps(values))
    convert(root / "m", root / "out", UPCAST)
    after = json.loads((root / "out" / "config.json").read_text())
    rest = small_config()
    assert {k: v for k, v in after.items() if k != "quantization_config"} == rest
    return after.get("quantization_config")


def plain_modules(fp8_tensors: dict[str, torch.Tensor]) -> set[str]:
    """The modules with a matrix that is not quantised."""
    return {n.removesuffix(".weight") for n, t in fp8_tensors.items() if t.ndim == 2 and t.dtype == torch.bfloat16}


@pytest.mark.parametrize("key", ["modules_to_not_convert", "ignored_layers", "ignore", "exclude", "exclude_modules"])
def test_a_list_that_is_there_gets_the_new_names_and_keeps_the_old(
    key: str, fp8_tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    old = ["lm_head", "model.layers.0.self_attn.indexers_proj", WK[1]]
    after = upcast(fp8_tensors, tmp_path, {**BLOCK, key: old})
    assert after[key][:3] == old and len(after[key]) == len(set(after[key]))
    assert set(after[key]) == {*old, *NEW}
    if key != "modules_to_not_convert":  # without it transformers, and with it alone vLLM and SGLang, hear of nothing
        assert set(after.pop("modules_to_not_convert")) == {*NEW, *plain_modules(fp8_tensors)}
    assert {k: v for k, v in after.items() if k != key} == BLOCK


def test_of_two_lists_both_are_kept_up(fp8_tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """vLLM and SGLang do not look at modules_to_not_convert if there is ignored_layers."""
    after = upcast(fp8_tensors, tmp_path, {**BLOCK, "ignored_layers": [], "modules_to_not_convert": ["lm_head"]})
    assert set(after["ignored_layers"]) == NEW and set(after["modules_to_not_convert"]) == {"lm_head", *NEW}


@pytest.mark.parametrize(
    ("method", "key"),
    [
        ("fp8", "modules_to_not_convert"),
        ("compressed-tensors", "ignore"),
        ("quark", "exclude"),
        ("modelopt", "ignore"),
        ("modelopt", "exclude_modules"),
        ("modelopt_fp4", "ignore"),
        ("ModelOpt_mixed", "exclude_modules"),
        ("w4afp8", "modules_to_not_convert"),
    ],
)
def test_a_new_list_names_every_plain_matrix(
    method: str, key: str, fp8_tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    after = upcast(fp8_tensors, tmp_path, {**BLOCK, "quant_method": method, key: None})
    assert set(after[key]) == plain_modules(fp8_tensors) | NEW and len(after[key]) == len(set(after[key]))


@pytest.mark.parametrize(
    ("block", "path"),
    [
        ({"quantization": {"quant_algo": "NVFP4"}}, ("quantization", "exclude_modules")),
        ({"quantization": {"quant_algo": "NVFP4", "exclude_modules": None}}, ("quantization", "exclude_modules")),
        ({"producer": {"name": "modelopt"}, "quantization": {}}, ("quantization", "exclude_modules")),
        ({"producer": {"name": "modelopt"}, "quant_algo": "NVFP4"}, ("ignore",)),
        ({"quant_method": "modelopt_fp4", "exclude_modules": ["lm_head"]}, ("ignore",)),
        ({"quant_algo": "FP8"}, ("ignore",)),
    ],
)
@pytest.mark.parametrize("where", ["config.json", "hf_quant_config.json", "quant_config.json"])
def test_modelopt_gets_the_list_that_its_form_is_read_by(
    where: str, block: dict[str, Any], path: tuple[str, ...], fp8_tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """vLLM, SGLang and TensorRT-LLM read exclude_modules under "quantization", and ignore where all lies flat."""
    after = upcast(fp8_tensors, tmp_path, *((block,) if where == "config.json" else (None, {where: block})))
    if where != "config.json":
        after = json.loads((tmp_path / "out" / where).read_text())
    for key in path:
        after = after[key]
    assert set(after) == plain_modules(fp8_tensors) | NEW


def test_the_old_key_of_compressed_tensors_follows_too(fp8_tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    for name, block in {"bare": {}, "method": {"quant_method": "compressed-tensors"}}.items():
        nested = {"nested": {"quantization_config": {"format": "float-quantized", **block}, "sparsity_config": {}}}
        for values in (block | {"ignore": []}, block, nested["nested"]):
            root = tmp_path / f"{name}{len(list(tmp_path.iterdir()))}"
            write_small(root / "m", small_config(compression_config=values), fp8_tensors)
            assert convert(root / "m", root / "out", UPCAST).warnings == ()
            after = json.loads((root / "out" / "config.json").read_text())["compression_config"]
            listed = set(after.get("quantization_config", after)["ignore"])
            assert listed == (NEW if "ignore" in values else NEW | plain_modules(fp8_tensors))


@pytest.mark.parametrize(
    ("config", "files", "words"),
    [
        ({"quantization_config": "fp8"}, {}, "config.json: quantization_config: is of no known form"),
        ({"quantization_config": {"bits": 8}}, {}, "config.json: quantization_config: is of no known form"),
        ({"compression_config": [1]}, {}, "config.json: compression_config: is of no known form"),
        ({"quantization_config": {"quant_method": "new"}}, {}, "config.json: .*: quant_method new is not known here"),
        ({}, {"quant_config.json": [1]}, "quant_config.json: is of no known form"),
        ({}, {"quantize_config.json": {"bits": 4}}, "quantize_config.json: is of no known form"),
        ({}, {"hf_quant_config.json": 3}, "hf_quant_config.json: is of no known form"),
        ({}, {"quant_model_description.json": {"a.weight": "W8A8"}}, "quant_model_description.json: is of no known"),
    ],
)
def test_what_cannot_be_kept_up_is_named_with_the_modules(
    config: dict[str, Any], files: dict[str, Any], words: str, fp8_tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    write_small(tmp_path / "m", small_config(**config), fp8_tensors)
    for name, values in files.items():
        (tmp_path / "m" / name).write_text(json.dumps(values))
    report = convert(tmp_path / "m", tmp_path / "out", UPCAST)
    (warning,) = report.warnings
    assert re.match(words, warning) and "model.layers.{0-3}.self_attn.indexer.wk, " in warning + ", "
    assert warning in show_conversion(report, None)
    for name in files:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "m" / name).read_bytes()


def test_a_model_without_quantization_config_keeps_its_config_byte_for_byte(
    fp8_tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    assert upcast(fp8_tensors, tmp_path, None) is None
    assert (tmp_path / "out" / "config.json").read_bytes() == (tmp_path / "m" / "config.json").read_bytes()


def test_the_quantisers_own_files_follow(fp8_tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    modelopt = {
        "quantization": {
            "quant_algo": "MIXED",
            "exclude_modules": ["lm_head"],
            "quantized_layers": {WK[0]: {}, "a": {}},
        }
    }
    ascend = {WK[0] + ".weight": "W8A8", WK[0] + ".weight_scale": "W8A8", "b.weight": "W8A8"}
    files = {"hf_quant_config.json": modelopt, "quant_model_description.json": ascend}
    upcast(fp8_tensors, tmp_path, BLOCK, files)
    out = tmp_path / "out"
    after = json.loads((out / "hf_quant_config.json").read_text())["quantization"]
    assert set(after["exclude_modules"]) == {"lm_head", *NEW} and after["quantized_layers"] == {"a": {}}
    assert json.loads((out / "quant_model_description.json").read_text()) == {
        WK[0] + ".weight": "FLOAT",
        "b.weight": "W8A8",
    }


@pytest.mark.parametrize("patterns", [("*",), ("model", "lm_head"), ("self_attn.*", "mlp.*", "eh_proj")])
def test_an_upcast_that_leaves_nothing_quantised_leaves_no_word_of_it(
    patterns: tuple[str, ...], fp8_tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    write_small(tmp_path / "m", small_config(quantization_config=BLOCK, compression_config={}), fp8_tensors)
    for name in ("hf_quant_config.json", "quant_config.json"):
        (tmp_path / "m" / name).write_text('{"quantization": {"quant_algo": "FP8"}}')
    report = convert(tmp_path / "m", tmp_path / "out", Mode("upcast", patterns))
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == small_config(torch_dtype="bfloat16")
    assert report.dropped == ("hf_quant_config.json", "quant_config.json") and report.warnings == ()
    assert not any((tmp_path / "out" / name).exists() for name in report.dropped)


def test_an_upcast_of_almost_everything_keeps_what_says_so(
    fp8_tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    write_small(tmp_path / "m", small_config(quantization_config=BLOCK), fp8_tensors)
    report = convert(
        tmp_path / "m", tmp_path / "out", Mode("upcast", ("self_attn", "mlp.shared_experts", "mlp.experts"))
    )
    after = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert "model.layers.1.mlp.experts.7.down_proj" in after["modules_to_not_convert"] and report.dropped == ()
    assert "model.layers.0.mlp.down_proj" not in after["modules_to_not_convert"]


def test_bf16_leaves_no_word_of_a_quantisation(fp8_tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    config = small_config(quantization_config=BLOCK, compression_config={}, torch_dtype="float8", name="ü")
    write_small(tmp_path / "m", config, fp8_tensors)
    for name in ("hf_quant_config.json", "quant_model_description.json", "generation_config.json"):
        (tmp_path / "m" / name).write_text("{}")
    report = convert(tmp_path / "m", tmp_path / "out", BF16)
    raw = (tmp_path / "out" / "config.json").read_text(encoding="utf-8")
    assert json.loads(raw) == small_config(torch_dtype="bfloat16", name="ü") and "ü" in raw
    assert list(json.loads(raw))[:3] == list(config)[:3]  # in the order that people know
    assert report.dropped == ("hf_quant_config.json", "quant_model_description.json")
    assert not any((tmp_path / "out" / name).exists() for name in report.dropped)
    assert (tmp_path / "out" / "generation_config.json").exists()


@pytest.mark.parametrize(("key", "expected"), [("dtype", "dtype"), ("torch_dtype", "torch_dtype"), ("", "torch_dtype")])
def test_bf16_says_so_under_the_name_that_the_config_uses(
    key: str, expected: str, fp8_tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    write_small(tmp_path / "m", small_config(**({key: "float32"} if key else {})), fp8_tensors)
    convert(tmp_path / "m", tmp_path / "out", BF16)
    after = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {k: v for k, v in after.items() if "dtype" in k} == {expected: "bfloat16"}
