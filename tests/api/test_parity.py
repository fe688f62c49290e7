"""The whole product against transformers: files on disk to `LLM.score`, plain and FP8, float32 and auto."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_dict
from torch import Tensor
from transformers_models import (
    CONFIGS,
    FP8_CONFIGS,
    WIDE,
    draw_tokens,
    find_log_probs,
    make_oracle,
    save_oracle,
    write_fp8,
)

from saccade import LLM, SamplingParams
from saccade.kernels import reference
from saccade.kernels.reference import choose_experts


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
