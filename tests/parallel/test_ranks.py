"""Many ranks give what one gives: log-probabilities, text and selections, the same bits on every rank."""

from pathlib import Path
from typing import Any

import pytest
import rank_cases
import torch
from rank_pool import RankPool
from tiny_models import tiny_dict
from transformers_models import CONFIGS, FP8_CONFIGS, draw_tokens, make_oracle, save_oracle, write_fp8

from saccade.parallel.ranks import ONE_RANK

PROMPTS = [draw_tokens(90, seed=4), draw_tokens(41, seed=5)]  # index_topk is 16
BOUND = 1e-5


def compare(ranks: RankPool, tp: int, ep: int, root: Path, options: dict[str, Any], bound: float = BOUND) -> None:
    expected = rank_cases.answer(ONE_RANK, root, PROMPTS, options)
    first, *others = ranks.run(rank_cases.answer, tp, ep, root, PROMPTS, options)
    for other in others:
        assert other.scores == first.scores and other.tokens == first.tokens
        assert all(a.equal(b) for a, b in zip(other.selections, first.selections, strict=True))
    assert (torch.tensor(first.scores) - torch.tensor(expected.scores)).abs().max() < bound
    assert first.tokens == expected.tokens
    assert all(a.equal(b) for a, b in zip(first.selections, expected.selections, strict=True))


@pytest.mark.parametrize(
    ("name", "tp", "ep"),
    [
        ("deepseek", 2, 1),
        ("deepseek, experts in every layer, in groups", 2, 2),
        ("glm, IndexShare by list", 4, 2),
        ("deepseek, ragged heads", 3, 1),
    ],
)
def test_ranks_equal_one(ranks: RankPool, name: str, tp: int, ep: int, tmp_path: Path) -> None:
    values = CONFIGS[name] | ({"moe_intermediate_size": 33, "n_shared_experts": 1} if tp == 3 else {})
    save_oracle(make_oracle(tiny_dict(**values), seed=3), tmp_path)
    compare(ranks, tp, ep, tmp_path, {"dtype": "float32", "max_batch_tokens": 64})


@pytest.mark.parametrize(("name", "tp", "ep"), [("deepseek", 2, 1), ("glm", 2, 2)])
def test_ranks_of_fp8_equal_one(ranks: RankPool, name: str, tp: int, ep: int, tmp_path: Path) -> None:
    write_fp8(tmp_path, tiny_dict(**FP8_CONFIGS[name]), False)
    compare(ranks, tp, ep, tmp_path, {"dtype": "float32"})
