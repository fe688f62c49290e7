"""A converted model as other engines see it: each builds a linear plain or quantised by its own way of matching names."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from published_configs import FP8 as BLOCK
from safetensors.torch import load_file
from small_checkpoints import small_config, write_small
from tiny_models import tiny_dict
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers_models import FP8_CONFIGS, MODELS, write_fp8

from saccade.convert.changes import Mode
from saccade.convert.convert import convert

UPCAST, BF16, FP8 = Mode("upcast", ("indexer.wk",)), Mode("bf16"), Mode("fp8")


def linears(config: dict[str, Any]) -> set[str]:
    """The linear modules of transformers' model."""
    config_class, model_class = MODELS[config["model_type"]]
    with torch.device("meta"):
        model = model_class._from_config(config_class(**config), attn_implementation="eager")
    return {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}


def is_plain_to_vllm(module: str, listed: list[str]) -> bool:
    return module in listed


def is_plain_to_sglang(module: str, listed: list[str]) -> bool:
    return any(f".{name}." in f".{module}." for name in listed)


def is_plain_to_old_sglang(module: str, listed: list[str]) -> bool:
    return any(name in module for name in listed)


def is_plain_to_transformers(module: str, listed: list[str]) -> bool:
    return not should_convert_module(module, listed)


@pytest.mark.parametrize("published_list", [None, ["lm_head", "re_nothing", "model.layers.0.self_attn.indexers_proj"]])
@pytest.mark.parametrize("name", FP8_CONFIGS)
@pytest.mark.parametrize("mode", [UPCAST, FP8], ids=["upcast", "fp8"])
def test_every_engine_builds_each_linear_as_it_is_stored(
    mode: Mode, name: str, published_list: list[str] | None, tmp_path: Path
) -> None:
    """The decision of each engine by the list, for every linear module, against the dtypes in the files."""
    config = tiny_dict(**FP8_CONFIGS[name])
    write_fp8(tmp_path / "m", config, power_of_two=True)
    if mode is FP8:
        convert(tmp_path / "m", tmp_path / "plain", BF16)
    source = tmp_path / ("plain" if mode is FP8 else "m")
    values = json.loads((source / "config.json").read_text())
    values["quantization_config"] = {**BLOCK, **({"modules_to_not_convert": published_list} if published_list else {})}
    (source / "config.json").write_text(json.dumps(values))
    convert(source, tmp_path / "out", mode)
    listed = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["modules_to_not_convert"]
    stored = {n: t for f in (tmp_path / "out").glob("*.safetensors") for n, t in load_file(f).items()}
    modules = linears(values)
    assert len(modules) > 20 and all(m + ".weight" in stored for m in modules)
    engines = [is_plain_to_vllm, is_plain_to_sglang, is_plain_to_old_sglang, is_plain_to_transformers]
    for module in modules:
        is_plain = stored[module + ".weight"].dtype != torch.float8_e4m3fn
        told = {f.__name__: f(module, listed) for f in engines}
        assert set(told.values()) == {is_plain}, (module, told)


def test_sglangs_name_of_the_mtp_block_is_listed(fp8_tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    block = {**BLOCK, "modules_to_not_convert": []}
    convert(write_small(tmp_path / "m", small_config(quantization_config=block), fp8_tensors), tmp_path / "out", UPCAST)
    listed = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["modules_to_not_convert"]
    assert is_plain_to_sglang("model.decoder.self_attn.indexer.wk", listed)
    assert not is_plain_to_sglang("model.decoder.self_attn.indexer.wq_b", listed)
