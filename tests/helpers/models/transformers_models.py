"""The oracle: random small models of transformers, their published tensors and their log-probabilities."""

import json
import math
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from small_checkpoints import decode, write_small
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
    fill_randomly(model, seed)
    return model


def fill_randomly(model: Any, seed: int) -> None:
    """Numbers of which none is trivial: norms around 1, biases around 0."""
    dice = torch.Generator().manual_seed(seed)
    for name, t in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("inv_freq"):
            continue
        noise = torch.randn(t.shape, generator=dice)
        centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        t.data.copy_(centre + 0.3 * noise if t.ndim == 1 else noise * t.shape[-1] ** -0.5)


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


GLM = {"model_type": "glm_moe_dsa", "rms_norm_eps": 1e-5}
SHARED = ["full", "shared", "full", "shared", "shared"]


def yarn(**keys: Any) -> dict[str, Any]:
    table = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 32}
    return {"rope_parameters": table | keys}


CONFIGS: dict[str, dict[str, Any]] = {
    "deepseek": {},
    "deepseek, dense layers only": {"first_k_dense_replace": 3},
    "deepseek, experts in every layer, in groups": {
        "first_k_dense_replace": 0, "n_shared_experts": 2, "n_group": 4, "topk_group": 2,
    },
    "deepseek, YaRN with equal mscales, groups": yarn(mscale=1.0, mscale_all_dim=1.0) | {"n_group": 2, "topk_group": 1},
    "deepseek, YaRN with unequal mscales": yarn(mscale=0.7, mscale_all_dim=1.4),
    "deepseek, YaRN without mscales": yarn(),
    "deepseek, YaRN with mscale_all_dim alone": yarn(mscale_all_dim=1.0),
    "deepseek, YaRN with attention_factor, not truncated": yarn(attention_factor=0.8, truncate=False, beta_fast=8.0),
    "deepseek, ragged heads": {
        "num_attention_heads": 3, "num_key_value_heads": 3, "qk_nope_head_dim": 40, "qk_rope_head_dim": 8,
        "v_head_dim": 56, "index_n_heads": 17, "index_head_dim": 24,
    },
    "glm": GLM,
    "glm, YaRN": GLM | yarn(mscale=1.0, mscale_all_dim=0.5),
    "glm, IndexShare by list": GLM | {"num_hidden_layers": 5, "indexer_types": SHARED},
    "glm, IndexShare by frequency": GLM | {"num_hidden_layers": 6, "index_topk_freq": 2, "index_skip_topk_offset": 1},
    "glm, groups, ragged heads": GLM | {
        "n_group": 2, "topk_group": 2, "qk_nope_head_dim": 36, "v_head_dim": 28, "routed_scaling_factor": 1.3,
    },
}  # fmt: skip


def draw_tokens(n: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 96, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


WIDE = {  # several scale blocks in every direction, and ragged ends: kv_a 2.5 blocks of rows, heads 0.75
    "hidden_size": 320, "intermediate_size": 384, "moe_intermediate_size": 136, "q_lora_rank": 160, "kv_lora_rank": 288,
    "qk_nope_head_dim": 56, "qk_rope_head_dim": 32, "v_head_dim": 40, "index_head_dim": 64, "vocab_size": 96,
}  # fmt: skip
FP8_CONFIGS = {
    "deepseek": WIDE | yarn(mscale=1.0, mscale_all_dim=1.0) | {"n_group": 2, "topk_group": 1},
    "glm": WIDE | GLM | {"num_hidden_layers": 5, "indexer_types": SHARED},
}


def quantise(weight: Tensor, power_of_two: bool, seed: int) -> tuple[Tensor, Tensor]:
    """Codes and scales of 128x128 blocks, block by block; scales of neighbours differ by up to 2^6 beyond need."""
    rows, columns = (math.ceil(n / 128) for n in weight.shape)
    spare = torch.randint(0, 7, (rows, columns), generator=torch.Generator().manual_seed(seed))
    codes, scales = torch.empty(weight.shape, dtype=torch.float8_e4m3fn), torch.empty(rows, columns)
    for i in range(rows):
        for j in range(columns):
            block = weight[128 * i : 128 * i + 128, 128 * j : 128 * j + 128]
            scale = block.abs().max() / 448 * 2.0 ** -float(spare[i, j]) * 64
            scale = torch.exp2(torch.log2(scale).ceil()) if power_of_two else scale * 1.003
            scales[i, j] = scale
            codes[128 * i : 128 * i + 128, 128 * j : 128 * j + 128] = (block / scale).to(torch.float8_e4m3fn)
    return codes, scales


KEPT = ("embed_tokens", "lm_head", "norm", "mlp.gate.", "weights_proj")


def to_fp8(tensors: dict[str, Tensor], power_of_two: bool) -> dict[str, Tensor]:
    """The published layout: matrices but for KEPT as FP8, the rest BF16, the router's bias F32."""
    out: dict[str, Tensor] = {}
    for seed, (name, t) in enumerate(tensors.items()):
        if t.ndim == 2 and not any(kept in name for kept in KEPT):
            out[name], out[name + "_scale_inv"] = quantise(t, power_of_two, seed)
        else:
            out[name] = t if "bias" in name else t.bfloat16()
    return out


def write_fp8(root: Path, values: dict[str, Any], power_of_two: bool, gain: float = 1.0) -> Any:
    """An FP8 checkpoint shuffled over four files, and transformers on its independently dequantised weights."""
    plain = root / "plain"
    oracle = make_oracle(values, seed=7)
    for parameter in oracle.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(gain)
    tensors = to_fp8(save_oracle(oracle, plain), power_of_two)
    config = json.loads((plain / "config.json").read_text())
    write_small(root, config, tensors, shard_of=lambda n: sum(map(ord, n)) % 4, seed=11)
    for file in plain.glob("*.safetensors*"):
        file.unlink()
    decoded = {n: decode(tensors, n) for n in tensors if not n.endswith("_scale_inv")}
    save_file(decoded, plain / "model.safetensors", metadata={"format": "pt"})
    model_class = MODELS[values["model_type"]][1]
    return model_class.from_pretrained(plain, dtype=torch.float32, attn_implementation="eager").eval()
