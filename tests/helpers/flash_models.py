"""Random small models of GLM-5.3-Flash by transformers: the oracle, and its checkpoint."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers.models.glm5_next.configuration_glm5_next import Glm5NextConfig
from transformers.models.glm5_next.modeling_glm5_next import Glm5NextForConditionalGeneration

from saccade.models.parameters import Extras, Layout
from saccade.models.registry import find_family, make_config

ATTENTION, RECURRENT = "indexed_attention", "linear_attention"
VISION = {
    "depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 32,
    "projection_intermediate_size": 32,
}  # fmt: skip
IMAGE_TOKENS = (
    "image_token_id", "video_token_id", "image_start_token_id", "image_end_token_id", "video_start_token_id",
    "video_end_token_id",
)  # fmt: skip


def flash_text(**changes: Any) -> dict[str, Any]:
    """text_config of a model that runs in milliseconds; contexts above 16 tokens are sparse. With fewer index heads,
    many scores are exactly 0, and engines break such ties as they like."""
    layers = changes.get("num_hidden_layers", 4)
    return {
        "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32,
        "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 4, "n_shared_experts": 1,
        "n_routed_experts": 8, "routed_scaling_factor": 2.5, "kv_lora_rank": 32, "q_lora_rank": 48,
        "qk_rope_head_dim": 0, "v_head_dim": 20, "qk_nope_head_dim": 24, "n_group": 1, "topk_group": 1,
        "num_experts_per_tok": 3, "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "index_topk": 16,
        "index_head_dim": 32, "index_n_heads": 16, "linear_head_dim": 16, "linear_num_heads": 4,
        "linear_conv_kernel_dim": 4, "hc_mult": 4, "index_kpool": 4, "pad_token_id": 0, "bos_token_id": 0,
        "eos_token_id": 1, "mlp_layer_types": ["dense"] + ["sparse"] * (layers - 1), "swiglu_limit": 1.5,
    } | changes  # fmt: skip


def write_flash(root: Path, seed: int = 0, **changes: Any) -> Any:
    """A float32 model of `flash_text`, saved under the published names at `root`. Nothing in it is trivial."""
    tokens = {name: 90 + i for i, name in enumerate(IMAGE_TOKENS)}
    config = Glm5NextConfig(text_config=flash_text(**changes), vision_config=VISION, **tokens)
    model = Glm5NextForConditionalGeneration._from_config(config, attn_implementation="eager", dtype=torch.float32)
    dice = torch.Generator().manual_seed(seed)
    for name, t in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("inv_freq"):
            continue
        noise = torch.randn(t.shape, generator=dice)
        centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        t.data.copy_(centre + 0.3 * noise if t.ndim == 1 else noise * t.shape[-1] ** -0.5)
    model.save_pretrained(root)
    return model.eval()


@torch.no_grad()
def score_flash(model: Any, tokens: list[int]) -> list[float]:
    """Of each token but the first, its log-probability given those before it."""
    logits = model(torch.tensor([tokens]), use_cache=False).logits[0].float().log_softmax(-1)
    return logits[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0].tolist()


def add_mtp(root: Path, seed: int = 1) -> None:
    """An MTP layer of random numbers for a saved model, under the published names."""
    file = root / "model.safetensors"
    tensors, dice = load_file(file), torch.Generator().manual_seed(seed)
    config = make_config((root / "config.json").read_bytes())
    prefix = f"{find_family(config.model_type).layers}{config.num_hidden_layers}."
    for param in find_family(config.model_type).parameters(config, Layout(), Extras(mtp=True)):
        for part in param.parts:
            if part.source.startswith(prefix):
                noise = torch.randn(part.shape, generator=dice)
                centre = 1.0 if "norm" in part.source and part.source.endswith("weight") else 0.0
                is_matrix = len(part.shape) > 1
                tensors[part.source] = noise * part.shape[-1] ** -0.5 if is_matrix else centre + 0.3 * noise
    save_file(tensors, file, metadata={"format": "pt"})
