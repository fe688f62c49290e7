"""Random small models of GLM-5.3-Flash by transformers: the oracle, and its checkpoint."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers.models.glm5_next.configuration_glm5_next import Glm5NextConfig
from transformers.models.glm5_next.modeling_glm5_next import Glm5NextForConditionalGeneration
from transformers_models import fill_randomly

from saccade.models.parameters import Extras, Layout
from saccade.models.registry import make_config
from saccade.plan.names import find_layer_prefix, find_root, list_parameters

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
    fill_randomly(model, seed)
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
    prefix = find_layer_prefix(config, tensors, config.num_hidden_layers)
    for param in list_parameters(config, find_root(config, tensors), Layout(), Extras(mtp=True)):
        for part in param.parts:
            if part.source.startswith(prefix):
                noise = torch.randn(part.shape, generator=dice)
                centre = 1.0 if "norm" in part.source and part.source.endswith("weight") else 0.0
                is_matrix = len(part.shape) > 1
                tensors[part.source] = noise * part.shape[-1] ** -0.5 if is_matrix else centre + 0.3 * noise
    save_file(tensors, file, metadata={"format": "pt"})


class FlashMtpOracle:
    """A model of transformers, whose last layer serves as the MTP layer. transformers has none for this family: what
    stands around attention and experts is written out by hand, with plain residuals in place of streams."""

    def __init__(self, root: Path, seed: int = 0, **changes: Any):
        """Writes the checkpoint to `root`."""
        layers = flash_text(**changes)["num_hidden_layers"]
        kinds = [ATTENTION if i % 4 == 3 else RECURRENT for i in range(layers)]
        longer = changes | {"num_hidden_layers": layers + 1, "layer_types": [*kinds, ATTENTION]}
        self.model = write_flash(root, seed, **longer)
        text, dice = self.model.model.language_model, torch.Generator().manual_seed(seed + 1)
        self.text, self.block, self.layer = text, text.layers[layers], f"model.language_model.layers.{layers}."
        text.layers = text.layers[:layers]
        text.config.num_hidden_layers = layers
        hidden = text.config.hidden_size
        self.extra = {n: 1 + 0.3 * torch.randn(hidden, generator=dice) for n in ("enorm", "hnorm", "shared_head.norm")}
        self.extra["eh_proj"] = torch.randn(hidden, 2 * hidden, generator=dice) * (2 * hidden) ** -0.5
        file = root / "model.safetensors"
        kept = {n: t for n, t in load_file(file).items() if not n.startswith(self.layer + "hc_")}
        added = {f"{self.layer}{n}.weight": t for n, t in self.extra.items()}
        save_file(kept | added, file, metadata={"format": "pt"})
        config = json.loads((root / "config.json").read_text())
        for key in ("layer_types", "mlp_layer_types", "indexer_types"):
            config["text_config"][key] = config["text_config"][key][:layers]
        config["text_config"]["num_hidden_layers"] = layers
        (root / "config.json").write_text(json.dumps(config))

    @torch.no_grad()
    def find_hidden(self, tokens: list[int]) -> torch.Tensor:
        """The main model's state after its final norm, [T, hidden]."""
        return self.text(torch.tensor([tokens]), use_cache=False).last_hidden_state[0]

    @torch.no_grad()
    def step(self, next_tokens: list[int], hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(hidden [T, hidden], log-probabilities [T, vocab]) at positions 0, 1, ... of the MTP layer."""

        def norm(x: torch.Tensor, name: str) -> torch.Tensor:
            eps = self.text.config.rms_norm_eps
            return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * self.extra[name]

        embedded = norm(self.text.embed_tokens.weight[torch.tensor(next_tokens)], "enorm")
        x = (torch.cat([embedded, norm(hidden, "hnorm")], dim=-1) @ self.extra["eh_proj"].T)[None]
        mask = torch.ones(x.shape[:2], dtype=torch.bool)
        x = x + self.block.self_attn(hidden_states=self.block.input_layernorm(x), attention_mask=mask)[0]
        x = x + self.block.mlp(self.block.post_attention_layernorm(x))
        hidden = norm(x[0], "shared_head.norm")
        return hidden, (hidden @ self.model.lm_head.weight.T).log_softmax(-1)
