"""The check can fail: an indexer that is broken as loaders have broken it answers short prompts and loses long ones."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from whole_copies import Change, write_copy

from saccade.api.llm import LLM
from saccade.checkpoint.open import bundled_path
from saccade.engine.params import SamplingParams
from saccade.eval.drafts import Drafts
from saccade.eval.evaluate import evaluate
from saccade.kernels import reference

PROBLEMS, LENGTH = 2, 512  # with each fault none of them is answered
SHORT = ("\n12 + 7 = 19", "\n60 / 5 = 12\n#### 12", "Tom has 12 apples. He buys 7 more.")  # index_topk is 16


def keep(name: str, tensor: Tensor) -> Tensor:
    return tensor


def lose_scales(name: str, tensor: Tensor) -> Tensor:
    """FP8 codes taken as numbers, the scales ignored."""
    return torch.ones_like(tensor) if name.endswith("indexer.wk.weight_scale_inv") else tensor


def take_the_neighbours_scale(name: str, tensor: Tensor) -> Tensor:
    """The last of the four column blocks gets the scale of the one before."""
    return tensor[:, [0, 1, 2, 2]].contiguous() if name.endswith("indexer.wk.weight_scale_inv") else tensor


def randomize(suffix: str) -> Change:
    def change(name: str, tensor: Tensor) -> Tensor:
        if not name.endswith(suffix):
            return tensor
        noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1))
        spread = tensor.float().square().mean().sqrt()
        return (noise * spread).clamp(-448, 448).to(tensor.dtype)

    return change


def score_short(path: Path) -> Tensor:
    """Log-probabilities of texts of at most index_topk tokens, of which an indexer can hide nothing."""
    llm = LLM(path)
    return torch.tensor([p for text in SHORT for p in llm.score(llm.encode(text))])


def find_recall(path: Path, name: str) -> float:
    report = evaluate(path, PROBLEMS, LENGTH, probed=0, asked=["recall"])
    print(f"{name}: {report.matches[0].exact} of {PROBLEMS}")
    return report.matches[0].share


@pytest.fixture(scope="module")
def intact() -> Tensor:
    llm = LLM()
    assert all(len(llm.encode(text)) <= llm.config.index_topk for text in SHORT)
    assert llm.generate(SHORT[0][:-3], SamplingParams(temperature=0.0, max_tokens=2))[0].text == " 19"
    return score_short(bundled_path())


def test_an_intact_copy_recalls(tmp_path: Path) -> None:
    assert find_recall(write_copy(tmp_path, keep), "none") >= 0.9


@pytest.mark.parametrize(
    "change, config",
    [
        pytest.param(lose_scales, {}, id="scales of wk lost"),
        pytest.param(take_the_neighbours_scale, {}, id="scale of the last block wrong"),
        pytest.param(keep, {"indexer_rope_interleave": True}, id="RoPE layout wrong"),
    ],
)
def test_a_broken_indexer_passes_short_and_fails_long(
    change: Change,
    config: dict[str, object],
    tmp_path: Path,
    intact: Tensor,
    request: pytest.FixtureRequest,
) -> None:
    path = write_copy(tmp_path, change, **config)
    assert torch.allclose(score_short(path), intact, atol=1e-4)
    assert find_recall(path, request.node.callspec.id) < 0.5


def test_a_random_selection_passes_short_and_fails_long(monkeypatch: pytest.MonkeyPatch, intact: Tensor) -> None:
    exact = reference.select
    dice = torch.Generator().manual_seed(0)

    def select(logits: Tensor, positions: Tensor, k: int) -> Tensor:
        chance = torch.rand(logits.shape, generator=dice)
        return exact(chance.masked_fill(logits == float("-inf"), float("-inf")), positions, k)

    monkeypatch.setattr(reference, "select", select)
    assert torch.allclose(score_short(bundled_path()), intact, atol=1e-4)
    assert find_recall(bundled_path(), "random selection") < 0.5


def find_drafts(path: Path, problems: int, length: int, *tasks: str) -> dict[str, Drafts]:
    report = evaluate(path, problems, length, probed=0, asked=tasks)
    for d in report.drafts:
        print(f"{d.places}: {d.accepted} of {d.tokens}")
    return {d.places: d for d in report.drafts}


def test_drafts_are_accepted_unless_the_mtp_layer_is_broken(tmp_path: Path) -> None:
    """Of all tokens of an answer many follow from the one before (` +`, ` =`, `of`), which a broken layer still knows;
    the values of facts must be found."""
    right = find_drafts(bundled_path(), 4, LENGTH, "recall") | find_drafts(bundled_path(), 2, 256, "words", "story")
    assert right.keys() == {"words", "recall", "recall, found values", "story"}
    assert all(d.tokens >= 8 and d.share >= 0.6 for d in right.values())
    for suffix in ("layers.4.self_attn.indexer.wk.weight", "layers.4.hnorm.weight"):
        folder = tmp_path / suffix
        folder.mkdir()
        print(suffix, "random:")
        broken = find_drafts(write_copy(folder, randomize(suffix)), 4, LENGTH, "recall")
        values = broken["recall, found values"]
        assert values.tokens == right["recall, found values"].tokens and values.share < 0.3
        assert broken["recall"].share < right["recall"].share - 0.3
