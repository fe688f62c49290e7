"""The oracle: random small models of transformers, their published tensors and their log-probabilities."""

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import DeepseekV32Config, DeepseekV32ForCausalLM, GlmMoeDsaConfig, GlmMoeDsaForCausalLM

MODELS = {
    "deepseek_v32": (DeepseekV32Config, DeepseekV32ForCausalLM),
    "glm_moe_dsa": (GlmMoeDsaConfig, GlmMoeDsaForCausalLM),
}


def make_oracle(values: dict[str, Any], seed: int = 0) -> Any:
    """A random float32 model of the config.json `values`. transformers starts norms at 1 and biases at 0, where leaving
    one out does not show; here nothing is trivial. Its latent norms in GLM-5 have 1e-6 whatever the config says; here
    they have what vLLM, SGLang and GLM's own newest code take (docs/accuracy.md)."""
    config_class, model_class = MODELS[values["model_type"]]
    model = model_class._from_config(config_class(**values), attn_implementation="eager", dtype=torch.float32).eval()
    if values["model_type"] == "glm_moe_dsa":
        for name, module in model.named_modules():
            if name.endswith(("q_a_layernorm", "kv_a_layernorm")):
                assert module.variance_epsilon > 0  # the name that its forward pass reads
                module.variance_epsilon = values["rms_norm_eps"]
    dice = torch.Generator().manual_seed(seed)
    for name, t in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("inv_freq"):
            continue
        noise = torch.randn(t.shape, generator=dice)
        centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        t.data.copy_(centre + 0.3 * noise if t.ndim == 1 else noise * t.shape[-1] ** -0.5)
    return model


def save_oracle(model: Any, root: Path) -> dict[str, Tensor]:
    """Write config.json and safetensors as transformers does; the tensors under their published names."""
    model.save_pretrained(root)
    return {name: t for file in sorted(root.glob("*.safetensors")) for name, t in load_file(file).items()}


@torch.no_grad()
def find_log_probs(model: Any, tokens: Sequence[int]) -> Tensor:
    """f32 [T, vocab]: of every next token, given the prefix."""
    return model(torch.tensor([list(tokens)])).logits[0].float().log_softmax(-1)


class MtpOracle:
    """A model whose last block serves as the MTP layer; the steps around the block are written out by hand."""

    def __init__(self, values: dict[str, Any], copies: bool, seed: int = 0):
        """`values`: config.json of the main model. `copies`: the MTP layer has its own embedding and head."""
        self.layer = layer = values["num_hidden_layers"]
        longer = values | {"num_hidden_layers": layer + 1}
        if "indexer_types" in values:
            longer["indexer_types"] = [*values["indexer_types"], "full"]
        self.whole = make_oracle(longer, seed)
        self.main, self.block = deepcopy(self.whole), deepcopy(self.whole)
        self.main.model.layers = self.whole.model.layers[:layer]
        self.block.model.layers = self.whole.model.layers[layer:]
        self.main.config.num_hidden_layers, self.block.config.num_hidden_layers = layer, 1
        dice, hidden, vocab = torch.Generator().manual_seed(seed + 1), values["hidden_size"], values["vocab_size"]
        self.extra = {
            name: 1 + 0.3 * torch.randn(hidden, generator=dice)
            for name in ("enorm.weight", "hnorm.weight", "shared_head.norm.weight")
        }
        self.extra["eh_proj.weight"] = torch.randn(hidden, 2 * hidden, generator=dice) * (2 * hidden) ** -0.5
        if copies:
            self.extra["embed_tokens.weight"] = torch.randn(vocab, hidden, generator=dice)
            self.extra["shared_head.head.weight"] = torch.randn(vocab, hidden, generator=dice)
        self.block.model.norm.weight.data = self.extra["shared_head.norm.weight"]
        self.embed = self.extra.get("embed_tokens.weight", self.whole.model.embed_tokens.weight)
        self.head = self.extra.get("shared_head.head.weight", self.whole.lm_head.weight)
        self.eps = values["rms_norm_eps"]

    def published(self, root: Path) -> dict[str, Tensor]:
        return save_oracle(self.whole, root) | {f"model.layers.{self.layer}.{n}": t for n, t in self.extra.items()}

    @torch.no_grad()
    def find_hidden(self, tokens: Sequence[int]) -> Tensor:
        """The main model's state after its final norm, [T, hidden]."""
        return self.main.model(torch.tensor([list(tokens)])).last_hidden_state[0]

    @torch.no_grad()
    def step(self, next_tokens: Sequence[int], hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(hidden [T, hidden], log-probabilities [T, vocab]) at positions 0, 1, ... of the MTP layer."""
        embedded = rms(self.embed[torch.tensor(next_tokens)], self.extra["enorm.weight"], self.eps)
        x = torch.cat([embedded, rms(hidden, self.extra["hnorm.weight"], self.eps)], dim=-1)
        x = x @ self.extra["eh_proj.weight"].T
        hidden = self.block.model(inputs_embeds=x[None], use_cache=False).last_hidden_state[0]
        return hidden, (hidden @ self.head.T).log_softmax(-1)


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight
