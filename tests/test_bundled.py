"""The bundled checkpoint is what the tool writes, in the published layout, and unforgiving where loaders fail."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file
from synthetic import published

from saccade.checkpoint.index import Index, read_index
from saccade.checkpoint.open import bundled_path
from saccade.config import ModelConfig
from saccade.plan import make_plan, prove
from saccade.tokenizer import Tokenizer

TOOL = Path(__file__).parent.parent / "tools" / "make_bundled.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_bundled", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def index() -> Index:
    return read_index(bundled_path())


def test_the_shipped_files_are_what_the_tool_writes(tool: ModuleType, tmp_path: Path) -> None:
    tool.main(tmp_path)
    shipped = {path.name: path.read_bytes() for path in bundled_path().iterdir()}
    written = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert sorted(written) == sorted(shipped)
    assert [name for name in written if written[name] != shipped[name]] == []
    assert sum(map(len, shipped.values())) < 4_000_000


def test_it_has_the_tensors_that_deepseek_publishes(tool: ModuleType, index: Index) -> None:
    """Names, dtypes and shapes, with those of the MTP layer: `published` was written from the survey of repositories."""
    expected = {name: (dtype, shape) for name, dtype, shape in published(tool.CONFIG, mtp_copies=True)}
    assert {e.name: (e.dtype, e.shape) for e in index.entries.values()} == expected
    assert {f"model.layers.3.{n}" for n in ("eh_proj.weight", "self_attn.indexer.wk.weight_scale_inv")} < set(expected)


def test_it_is_proven_complete() -> None:
    config = ModelConfig.load(bundled_path())
    assert config.notes == ()
    assert prove(make_plan(config, read_index(bundled_path()))) == []


def test_weights_and_scales_of_upcast_tensors_lie_in_different_files(index: Index) -> None:
    entries = index.entries
    pairs = [(e, entries[e.name + "_scale_inv"]) for e in entries.values() if e.dtype == "F8_E4M3"]
    apart = {weight.name for weight, scale in pairs if weight.file != scale.file}
    assert apart == {w.name for w, _ in pairs if w.name.split(".")[-2] in ("wk", "kv_b_proj")}
    assert {entries[name].file for name in apart} == {file.name for file in index.files}  # in both directions


def test_blocks_of_wk_have_unequal_power_of_two_scales() -> None:
    tensors = {k: v for path in bundled_path().glob("*.safetensors") for k, v in load_file(path).items()}
    scales = {name: t for name, t in tensors.items() if name.endswith(".wk.weight_scale_inv")}
    assert len(scales) == 4
    for scale in scales.values():
        assert scale.shape == (1, 4)
        assert scale.max() / scale.min() >= 2**6
    for name, scale in tensors.items():
        if name.endswith("_scale_inv"):
            assert torch.equal(torch.frexp(scale).mantissa, torch.full_like(scale, 0.5)), name


def test_its_tokenizer_is_made_of_bytes() -> None:
    tokenizer = Tokenizer.load(bundled_path())
    assert tokenizer is not None
    text = "Saccade, Größe, 视, 👁\n\0\x1b"
    assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.decode(tokenizer.encode(text)) == text
    config = json.loads((bundled_path() / "config.json").read_text())
    assert tokenizer.encoder.get_vocab_size() == config["vocab_size"]
    assert tokenizer.decode([config["bos_token_id"], 65, config["eos_token_id"]]) == "A"
