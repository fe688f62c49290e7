"""Write the bundled checkpoint: random numbers from a fixed seed, in exactly the layout of DeepSeek-V3.2.

    python tools/make_bundled.py [DIRECTORY]      default: saccade/bundled

FP8 e4m3 codes with power-of-two F32 scales for each 128x128 block, the MTP layer as layer `num_hidden_layers` with its
own indexer, embedding and head, and two shards. It is small, but made to be unforgiving: scales lie in another file
than their weights, and the column blocks of `wk` differ by 2^6 and more, because the layer norm behind it would hide
a scale that all of them share. The same bytes come out on every machine: only integers and exact operations are random.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from saccade.checkpoint.write import published_fp8, write_checkpoint
from saccade.config import ModelConfig
from saccade.plan import Layout
from saccade.plan.table import Extras, parameters

SEED = 20251124
SPECIAL = ("<bos>", "<eos>")  # tokens 256 and 257; token i below is byte i

CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV32ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 512,  # four column blocks in wk
    "index_head_dim": 32,
    "index_n_heads": 4,
    "index_topk": 16,  # a context of 17 tokens is sparse already
    "initializer_range": 0.02,
    "intermediate_size": 128,
    "kv_lora_rank": 64,
    "max_position_embeddings": 4096,
    "model_type": "deepseek_v32",
    "moe_intermediate_size": 16,
    "moe_layer_freq": 1,
    "n_group": 2,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 128,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 8,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 512,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "v_head_dim": 16,
    "vocab_size": 256 + len(SPECIAL),
}

GENERATION_CONFIG = {"bos_token_id": 256, "do_sample": True, "eos_token_id": [257], "temperature": 1.0, "top_p": 0.95}

# Powers of two, so that the codes of a block are those of the unscaled one: 2^6 between neighbours, 2^9 in all.
WK_COLUMN_FACTORS = (1.0, 2.0**-6, 2.0**3, 2.0**-3)


def main(root: Path) -> None:
    for old in [*root.glob("*.safetensors"), *root.glob("*.safetensors.index.json")]:
        old.unlink()
    write_checkpoint(root, CONFIG, published_fp8(tensors()), shard_of)
    text = json.dumps(GENERATION_CONFIG, indent=2, sort_keys=True) + "\n"
    (root / "generation_config.json").write_text(text, encoding="utf-8")
    (root / "tokenizer.json").write_text(byte_tokenizer().to_str(pretty=True) + "\n", encoding="utf-8")


def tensors() -> Iterator[tuple[str, Tensor]]:
    """Numbers for every tensor of the model, in the order of a forward pass: BF16 or F32 as DeepSeek ships them."""
    dice = torch.Generator().manual_seed(SEED)
    every = parameters(ModelConfig.from_dict(CONFIG), Layout(), Extras(mtp=True, mtp_embed=True, mtp_head=True))
    shapes = {part.source: part.shape for param in every for part in param.parts}  # kv_b_proj serves two parameters
    for name, shape in shapes.items():
        numbers = normal(shape, dice)
        if name.endswith(("k_norm.weight", "k_norm.bias", "e_score_correction_bias")):
            yield name, numbers / 8 + name.endswith(".weight")
        elif name.endswith("norm.weight"):
            yield name, (numbers / 8 + 1).bfloat16()
        elif name.endswith("embed_tokens.weight"):
            yield name, numbers.bfloat16()
        else:  # a matrix that keeps the size of what it multiplies
            numbers *= shape[1] ** -0.5
            if name.endswith(".wk.weight"):
                numbers *= torch.tensor(WK_COLUMN_FACTORS).repeat_interleave(128)
            elif name.endswith(("lm_head.weight", "shared_head.head.weight")):
                numbers *= head_rows()
            yield name, numbers.bfloat16()


def normal(shape: tuple[int, ...], dice: torch.Generator) -> Tensor:
    """About normal, with mean 0 and variance 1: sums of four 16-bit integers, which deviate by 2^16 / sqrt(3). The last
    bits of torch.randn depend on the processor; these do not."""
    sums = torch.randint(-(2**15), 2**15, (4, *shape), generator=dice).sum(0)
    return sums.float() * (3**0.5 * 2.0**-16)


def head_rows() -> Tensor:
    """Factors of the head's rows [vocabulary, 1]: a clear choice among printable ASCII, and next to no chance for other
    bytes, so that what a random model says is fit for a terminal."""
    rows = torch.full((CONFIG["vocab_size"], 1), 2.0**-6)
    rows[0x20:0x7F] = 4.0
    return rows


def shard_of(name: str) -> int:
    """The embedding and the first two layers in one file, the rest in the other; but the scales of what gets
    dequantised (wk, kv_b_proj) lie in the file that does not have their weights."""
    home = 0 if name.startswith(("model.embed_tokens.", "model.layers.0.", "model.layers.1.")) else 1
    is_apart = name.endswith((".wk.weight_scale_inv", ".kv_b_proj.weight_scale_inv"))
    return 1 - home if is_apart else home


def byte_tokenizer() -> Tokenizer:
    """Token i is byte i, for i below 256; no merges."""
    vocabulary = {spelling: byte for byte, spelling in enumerate(byte_spellings())}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in SPECIAL])
    return tokenizer


def byte_spellings() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary: itself if printable in Latin-1, else the next
    of those from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    stand_ins = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(stand_ins)) for byte in range(256)]


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent.parent / "saccade" / "bundled")
