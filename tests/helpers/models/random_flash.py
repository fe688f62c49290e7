"""A GLM-5.3-Flash of random numbers under the published names, large enough for the kernels of a GPU. transformers is
not asked: a GPU machine may have one that does not know the family."""

import json
from pathlib import Path

import torch
from flash_headers import published_flash, small_flash_config
from safetensors.torch import save_file

NUMBERS = {"BF16": torch.bfloat16, "F32": torch.float32}
# Dimensions of heads as published, but four heads and four layers; a context above 256 tokens is sparse.
TEXT = {
    "vocab_size": 1024, "hidden_size": 512, "intermediate_size": 512, "moe_intermediate_size": 128, "q_lora_rank": 256,
    "kv_lora_rank": 512, "qk_nope_head_dim": 256, "v_head_dim": 256, "n_routed_experts": 16, "num_experts_per_tok": 4,
    "index_n_heads": 32, "index_head_dim": 128, "index_topk": 256,
    "linear_attn_config": {
        "num_heads": 4, "head_dim": 128, "short_conv_kernel_size": 4, "gate_lower_bound": -5.0,
        "kda_layers": [0, 2], "full_attn_layers": [1, 3],
    },
}  # fmt: skip


def write_random_flash(root: Path, seed: int = 0) -> Path:
    """Matrices keep the size of what goes through them; norms, biases and gates differ from what they are at first."""
    config, dice = small_flash_config(), torch.Generator().manual_seed(seed)
    config["text_config"] |= TEXT
    tensors = {}
    for name, dtype, shape in published_flash(config):
        if name.startswith("model.visual"):
            continue
        noise = torch.randn(shape, generator=dice)
        is_gain = "norm" in name and name.endswith("weight")
        if is_gain or len(shape) == 1:
            numbers = (1.0 if is_gain else 0.0) + 0.2 * noise
        else:
            numbers = noise * (1.0 if "embed" in name else shape[-1] ** -0.5)
        tensors[name] = numbers.to(NUMBERS[dtype])
    root.mkdir(parents=True, exist_ok=True)
    (root / "config.json").write_text(json.dumps(config))
    save_file(tensors, root / "model.safetensors")
    return root
