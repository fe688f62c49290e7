"""Turn trained weights into a checkpoint in DeepSeek-V3.2's published FP8 layout.

    python -m tools.train_tiny.export PIECES DIRECTORY

PIECES is the folder that train.py wrote. Before quantisation the input channels of every attention are rescaled by
powers of two, a block of 128 at a time: the function stays the same to the last bit, but the scales of a `wk` then
differ, as they do in large models. With equal scales the layer norm behind `wk` would hide a scale that got lost.
"""

import argparse
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from saccade.checkpoint.open import bundled_path
from saccade.checkpoint.write import published_fp8, write_checkpoint
from saccade.models.dsa.config import ModelConfig
from tools.train_tiny import config
from tools.train_tiny.card import write_card
from tools.train_tiny.vocabulary import build_tokenizer
from tools.train_tiny.weights import F32, unstack_experts

BLOCK = 128
# By how many powers of two the input channels of a block grow. The last block, that of the tokens alone, grows most: an
# indexer whose scales got lost sees which token stands at a place, but not what it is about. The others change places
# from layer to layer. Scales of a trained `wk` differ by 2 at most, so a span of 2^9 here leaves at least 2^6.
GROWTH = (-3, 0, -4)
GROWTH_OF_LAST = 5
READERS = ("q_a_proj", "kv_a_proj_with_mqa", "indexer.wk", "indexer.weights_proj")  # of input_layernorm's output


def rescale(c: ModelConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same function, with other column scales: input_layernorm times 2^j, its readers' columns by 2^-j."""
    scaled = dict(weights)
    for layer in range(c.num_hidden_layers + 1):
        blocks = -(-c.hidden_size // BLOCK)
        exponents = [GROWTH[(block + layer) % len(GROWTH)] for block in range(blocks - 1)] + [GROWTH_OF_LAST]
        factor = torch.ldexp(torch.ones(blocks), torch.tensor(exponents)).repeat_interleave(BLOCK)[: c.hidden_size]
        p = f"model.layers.{layer}."
        norm = weights[p + "input_layernorm.weight"]
        scaled[p + "input_layernorm.weight"] = norm * factor.to(norm)
        for reader in READERS:
            name = f"{p}self_attn.{reader}.weight"
            scaled[name] = weights[name] / factor.to(norm)
    return scaled


def publish(c: ModelConfig, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor as it is stored."""
    for name, tensor in published_fp8(unstack_experts(rescale(c, weights))):
        is_plain = tensor.dtype == torch.float32 and not name.endswith((*F32, "_scale_inv"))
        yield name, tensor.bfloat16() if is_plain else tensor


def find_shard(name: str) -> int:
    """Embedding and two layers, two layers, the rest; but the scales of what is dequantised at load (wk, kv_b) lie in
    the next file, and those of q_b in the one before."""
    layer = int(name.split(".")[2]) if name.startswith("model.layers.") else 0 if "embed" in name else 4
    home = min(layer // 2, 2)
    if name.endswith((".wk.weight_scale_inv", ".kv_b_proj.weight_scale_inv")):
        return (home + 1) % 3
    return (home - 1) % 3 if name.endswith(".q_b_proj.weight_scale_inv") else home


def write_model(folder: Path, values: dict[str, object], weights: Mapping[str, Tensor]) -> None:
    """config.json with these values, the shards, tokenizer.json, generation_config.json, and the chat template, which
    is written by hand."""
    c = ModelConfig.from_dict(values)
    write_checkpoint(folder, values, publish(c, weights), find_shard)
    text = json.dumps(config.GENERATION_CONFIG, indent=2, sort_keys=True) + "\n"
    (folder / "generation_config.json").write_text(text, encoding="utf-8")
    shutil.copyfile(bundled_path() / "chat_template.jinja", folder / "chat_template.jinja")
    (folder / "tokenizer.json").write_text(build_tokenizer().to_str() + "\n", encoding="utf-8")


def load_pieces(folder: Path) -> dict[str, Tensor]:
    """What train.py's save_pieces wrote."""
    weights: dict[str, Tensor] = {}
    for path in sorted(folder.glob("weights-*.safetensors")):
        weights |= load_file(path)
    return weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pieces", type=Path)
    parser.add_argument("directory", type=Path)
    options = parser.parse_args()
    write_model(options.directory, config.CONFIG, load_pieces(options.pieces))
    write_card(options.directory, options.pieces / "scores.json")


if __name__ == "__main__":
    main()
