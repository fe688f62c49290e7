"""The bundled checkpoint: a trained model in the published layout, unforgiving where loaders fail."""

import json

import pytest
import torch
from header_checkpoints import published
from safetensors.torch import load_file

from saccade.checkpoint.index import Index, read_index
from saccade.checkpoint.open import bundled_path
from saccade.models.dsa.config import ModelConfig
from saccade.plan import make_plan, prove
from saccade.text.tokenizer import Tokenizer
from tools.train_tiny.config import CONFIG, GENERATION_CONFIG
from tools.train_tiny.vocabulary import build_tokenizer


@pytest.fixture(scope="module")
def index() -> Index:
    return read_index(bundled_path())


def test_config_and_tokenizer_are_what_the_trainer_exports() -> None:
    folder = bundled_path()
    config = json.loads((folder / "config.json").read_text())
    assert {key: config[key] for key in CONFIG} == CONFIG
    assert json.loads((folder / "generation_config.json").read_text()) == GENERATION_CONFIG
    assert json.loads((folder / "tokenizer.json").read_text()) == json.loads(build_tokenizer().to_str())


def test_it_is_small_and_says_what_it_is() -> None:
    files = {path.name: path.stat().st_size for path in bundled_path().iterdir()}
    assert sum(files.values()) < 16 << 20
    assert sum(name.endswith(".safetensors") for name in files) == 3
    card = (bundled_path() / "README.md").read_text()
    assert "test instrument" in card and "Trained from scratch" in card


def test_it_has_the_tensors_that_deepseek_publishes(index: Index) -> None:
    """Names, dtypes and shapes, with those of the MTP layer: `published` was written from the survey of repositories."""
    expected = {name: (dtype, shape) for name, dtype, shape in published(CONFIG, mtp_copies=False)}
    assert {e.name: (e.dtype, e.shape) for e in index.entries.values()} == expected
    assert {f"model.layers.4.{n}" for n in ("eh_proj.weight", "self_attn.indexer.wk.weight_scale_inv")} < set(expected)


def test_it_is_proven_complete() -> None:
    config = ModelConfig.load(bundled_path())
    assert config.notes == ()
    assert prove(make_plan(config, read_index(bundled_path()))) == []


def test_weights_and_scales_of_upcast_tensors_lie_in_different_files(index: Index) -> None:
    entries = index.entries
    pairs = [(e, entries[e.name + "_scale_inv"]) for e in entries.values() if e.dtype == "F8_E4M3"]
    apart = {weight.name for weight, scale in pairs if weight.file != scale.file}
    assert apart == {w.name for w, _ in pairs if w.name.split(".")[-2] in ("wk", "kv_b_proj", "q_b_proj")}
    assert {entries[name].file for name in apart} == {file.name for file in index.files}  # in both directions


def test_blocks_of_wk_have_unequal_power_of_two_scales() -> None:
    tensors = {k: v for path in bundled_path().glob("*.safetensors") for k, v in load_file(path).items()}
    scales = {name: t for name, t in tensors.items() if name.endswith(".wk.weight_scale_inv")}
    assert len(scales) == 5
    for scale in scales.values():
        assert scale.shape == (1, 4)
        assert scale.max() / scale.min() >= 2**6
    for name, scale in tensors.items():
        if name.endswith("_scale_inv"):
            assert torch.equal(torch.frexp(scale).mantissa, torch.full_like(scale, 0.5)), name


def test_its_tokenizer_gives_every_text_back() -> None:
    tokenizer = Tokenizer.load(bundled_path())
    assert tokenizer is not None
    text = "Saccade, Größe, 视, 👁\n\0\x1b Tom has 12 apples."
    assert tokenizer.decode(tokenizer.encode(text)) == text
