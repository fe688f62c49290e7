"""The whole product against transformers: files on disk to `LLM.score`, plain and FP8, float32 and auto."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import decode, write_small
from oracle import MODELS, find_log_probs, make_oracle, save_oracle
from safetensors.torch import load_file, save_file
from test_model import CONFIGS, GLM, SHARED, draw_tokens, yarn
from tiny import tiny_dict
from torch import Tensor

from saccade import LLM, SamplingParams
from saccade.kernels import reference
from saccade.kernels.reference import choose_experts

WIDE = {  # several scale blocks in every direction, and ragged ends: kv_a 2.5 blocks of rows, heads 0.75
    "hidden_size": 320, "intermediate_size": 384, "moe_intermediate_size": 136, "q_lora_rank": 160, "kv_lora_rank": 288,
    "qk_nope_head_dim": 56, "qk_rope_head_dim": 32, "v_head_dim": 40, "index_head_dim": 64, "vocab_size": 96,
}  # fmt: skip
FP8_CONFIGS = {
    "deepseek": WIDE | yarn(mscale=1.0, mscale_all_dim=1.0) | {"n_group": 2, "topk_group": 1},
    "glm": WIDE | GLM | {"num_hidden_layers": 5, "indexer_types": SHARED},
}


def score(root: Path, tokens: list[int], **options: Any) -> Tensor:
    return torch.tensor(LLM(root, device="cpu", **options).score(tokens))


def expected_scores(oracle: Any, tokens: list[int]) -> Tensor:
    return find_log_probs(oracle, tokens[:-1]).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]


@pytest.mark.parametrize("name", CONFIGS)
def test_score_equals_transformers(name: str, tmp_path: Path) -> None:
    oracle = make_oracle(tiny_dict(**CONFIGS[name]), seed=3)
    save_oracle(oracle, tmp_path)
    tokens = draw_tokens(150, seed=4)
    difference = (score(tmp_path, tokens, dtype="float32", max_batch_tokens=64) - expected_scores(oracle, tokens)).abs()
    assert difference.max() < 1e-4


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


@pytest.mark.parametrize("power_of_two", [True, False], ids=["powers of two", "any scales"])
@pytest.mark.parametrize("name", FP8_CONFIGS)
def test_fp8_equals_transformers_on_dequantised_weights(name: str, power_of_two: bool, tmp_path: Path) -> None:
    oracle = write_fp8(tmp_path, tiny_dict(**FP8_CONFIGS[name]), power_of_two)
    tokens = draw_tokens(150, seed=5)
    difference = (score(tmp_path, tokens, dtype="float32") - expected_scores(oracle, tokens)).abs()
    assert difference.max() < 1e-4


def compare_with_float32(
    root: Path, tokens: list[int], monkeypatch: pytest.MonkeyPatch
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each position: |difference of its next token's log-probability|, and whether all its layers selected the same
    tokens, and the same experts."""
    found = []
    for dtype in ("float32", "auto"):
        llm, routed = LLM(root, device="cpu", dtype=dtype), []

        def record(*args: Any, routed: list[Tensor] = routed) -> tuple[Tensor, Tensor]:
            experts, weights = choose_experts(*args)
            routed.append(experts.sort(1).values[: len(tokens) - 1])
            return experts, weights

        monkeypatch.setattr(reference, "choose_experts", record)
        seen = llm.generate([tokens], SamplingParams(max_tokens=1), capture_selection=True)[0].selections
        monkeypatch.setattr(reference, "choose_experts", choose_experts)
        assert seen is not None
        experts = torch.stack(routed[: llm.config.mlp_layer_types.count("sparse")])
        found.append((torch.tensor(llm.score(tokens)), torch.stack([s[: len(tokens) - 1] for s in seen]), experts))
    (exact, *chosen), (ours, *chosen_by_us) = found
    tokens_same, experts_same = ((a == b).all(2).all(0) for a, b in zip(chosen, chosen_by_us, strict=True))
    return (exact - ours).abs(), tokens_same, experts_same


@pytest.mark.parametrize("stored", ["FP8", "FP8, any scales", "BF16"])
@pytest.mark.parametrize("name", FP8_CONFIGS)
def test_auto_is_close_to_float32_where_the_selection_is_the_same(
    name: str, stored: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_testsuite_property: Any
) -> None:
    gain = 0.02 * WIDE["hidden_size"] ** 0.5  # matrices of the size that transformers starts with
    write_fp8(tmp_path, tiny_dict(**FP8_CONFIGS[name]), stored == "FP8", gain)
    root = tmp_path
    if stored == "BF16":
        root = tmp_path / "plain"
        tensors = load_file(root / "model.safetensors")
        save_file({n: t.bfloat16() for n, t in tensors.items()}, root / "model.safetensors")
    difference, tokens_same, experts_same = compare_with_float32(root, draw_tokens(150, seed=6), monkeypatch)
    same = difference[tokens_same & experts_same]
    figures = (
        f"median {same.median():.1e}, largest {same.max():.1e}; "
        f"same tokens in all layers {tokens_same.float().mean():.0%}, same experts {experts_same.float().mean():.0%}"
    )
    record_testsuite_property(f"auto against float32, {name}, {stored}", figures)
    print(figures)
    assert same.median() < 5e-3 and same.max() < 5e-2
    assert len(same) > 32  # and not only in contexts that index_topk covers
