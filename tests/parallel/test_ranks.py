"""Many ranks give what one gives: log-probabilities, text, selections and drafts, the same bits on every rank."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import rank_cases
import torch
from drafted_texts import draw_prompts
from flash_models import add_mtp, write_flash
from rank_pool import CASE_SECONDS, RankPool
from small_checkpoints import write_small
from tiny_models import tiny_config, tiny_dict, tiny_tensors
from torch import Tensor
from transformers_models import CONFIGS, FP8_CONFIGS, draw_tokens, make_oracle, save_oracle, write_fp8

from saccade.parallel.ranks import ONE_RANK

PROMPTS = [draw_tokens(90, seed=4), draw_tokens(41, seed=5)]  # index_topk is 16
BOUND = 1e-5
Prompts = Sequence[Sequence[int]]


def compare(
    ranks: RankPool, tp: int, ep: int, root: Path, bound: float = BOUND, prompts: Prompts = PROMPTS, **options: Any
) -> rank_cases.Answer:
    """Ranks against one. In less than float32 texts may part where two tokens, or two keys, are nearly as good."""
    expected = rank_cases.answer(ONE_RANK, root, prompts, options)
    first, *others = ranks.run(rank_cases.answer, tp, ep, root, prompts, options)
    for other in others:
        assert (other.scores, other.tokens, other.drafts) == (first.scores, first.tokens, first.drafts)
        assert all(a.equal(b) for a, b in zip(other.selections, first.selections, strict=True))
    difference = (torch.tensor(first.scores) - torch.tensor(expected.scores)).abs()
    print(f"largest difference {difference.max():.1e}")
    if options.get("dtype") == "float32":
        assert difference.max() < bound
        assert (first.tokens, first.drafts) == (expected.tokens, expected.drafts)
        assert all(a.equal(b) for a, b in zip(first.selections, expected.selections, strict=True))
    else:
        assert difference.median() < bound
    return first


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
    values = CONFIGS[name] | ({"moe_intermediate_size": 33, "vocab_size": 97} if tp == 3 else {})
    save_oracle(make_oracle(tiny_dict(**values), seed=3), tmp_path)
    compare(ranks, tp, ep, tmp_path, dtype="float32", max_batch_tokens=64)


@pytest.mark.parametrize(("name", "tp", "ep"), [("deepseek", 2, 1), ("glm", 2, 2)])
def test_ranks_of_fp8_equal_one(ranks: RankPool, name: str, tp: int, ep: int, tmp_path: Path) -> None:
    write_fp8(tmp_path, tiny_dict(**FP8_CONFIGS[name]), False)
    compare(ranks, tp, ep, tmp_path, dtype="float32")


def to_nvfp4(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Routed experts as random codes with scales, of numbers that are as large as before."""
    dice, made = torch.Generator().manual_seed(0), dict[str, Tensor]()
    for name, t in tensors.items():
        if ".experts." not in name:
            made[name] = t.bfloat16() if t.ndim == 2 else t
            continue
        stem, (rows, columns) = name.removesuffix("weight"), t.shape
        made[name] = torch.randint(0, 256, (rows, columns // 2), generator=dice).to(torch.uint8)
        scale = 0.5 + torch.rand(rows, columns // 16, generator=dice)
        made[stem + "weight_scale"] = scale.to(torch.float8_e4m3fn)
        made[stem + "weight_scale_2"] = torch.tensor(columns**-0.5 / 3)
    return made


@pytest.mark.parametrize(("dtype", "ep"), [("float32", 2), ("auto", 1)])
def test_ranks_of_nvfp4_experts_equal_one(ranks: RankPool, dtype: str, ep: int, tmp_path: Path) -> None:
    values = tiny_dict(moe_intermediate_size=64)
    tensors = to_nvfp4(tiny_tensors(tiny_config(**values), mtp=False))
    write_small(tmp_path, values, tensors)
    compare(ranks, 2, ep, tmp_path, BOUND if dtype == "float32" else 5e-3, dtype=dtype)


@pytest.mark.parametrize(("tp", "ep"), [(2, 1), (4, 2)])
def test_ranks_share_the_heads_of_recurrent_layers(ranks: RankPool, tp: int, ep: int, tmp_path: Path) -> None:
    """GLM-5.3-Flash: its sums go into several residual streams; each rank keeps the states of its own heads."""
    write_flash(tmp_path)
    prompts = [[2 + token % 88 for token in prompt] for prompt in PROMPTS]  # others stand for images
    compare(ranks, tp, ep, tmp_path, dtype="float32", max_batch_tokens=64, prompts=prompts)


def test_ranks_of_recurrent_layers_draft_what_one_drafts(ranks: RankPool, tmp_path: Path) -> None:
    """Of six words, so that many drafts are right; each rank's states do without those that are refused."""
    write_flash(tmp_path, vocab_size=6)
    add_mtp(tmp_path)
    prompts = [[token % 6 for token in prompt] for prompt in PROMPTS]
    found = compare(ranks, 2, 1, tmp_path, dtype="float32", max_batch_tokens=64, prompts=prompts, speculate=3)
    assert 0 < found.drafts[0] < 1


@pytest.mark.parametrize("copies", [True, False])
def test_ranks_draft_what_one_drafts(ranks: RankPool, copies: bool, tmp_path: Path) -> None:
    """With an embedding and a head of the MTP layer's own, and without; of 97 tokens, ranks hold 48 and 49."""
    values = tiny_dict(vocab_size=97, num_nextn_predict_layers=1)
    write_small(tmp_path, values, tiny_tensors(tiny_config(**values), copies=copies))
    found = compare(ranks, 2, 2, tmp_path, dtype="float32", speculate=3)
    assert len(found.drafts) > 0


def test_ranks_keep_the_same_fp8_latents(ranks: RankPool, tmp_path: Path) -> None:
    values = tiny_dict(vocab_size=97)
    write_small(tmp_path, values, tiny_tensors(tiny_config(**values)))
    # A code is the next one where the order of a sum of two ranks decides between them: 1/16 of a number of 64.
    compare(ranks, 2, 1, tmp_path, 1e-3, dtype="float32", max_batch_tokens=64, latent_cache="fp8")


def test_texts_of_the_bundled_model_are_those_of_one_rank(ranks: RankPool) -> None:
    check_texts(ranks, 6, 96, 24, 192)


@pytest.mark.soak
def test_100_texts_of_the_bundled_model_are_those_of_one_rank(ranks: RankPool) -> None:
    check_texts(ranks, 100, 512, 48, 1024, 1800.0)


def check_texts(
    ranks: RankPool, prompts: int, length: int, tokens: int, cache: int, seconds: float = CASE_SECONDS
) -> None:
    """In batches of requests that preempt each other, with drafts."""
    texts = draw_prompts(prompts, length)
    options = {"dtype": "float32", "max_requests": 5, "max_batch_tokens": 96, "cache_tokens": cache}
    one = rank_cases.write_texts(ONE_RANK, texts, tokens, options)
    options["speculate"] = 2
    for found in ranks.run(rank_cases.write_texts, 2, 2, texts, tokens, options, seconds=seconds):
        assert found.tokens == one.tokens
        assert found.preemptions > 0 and found.drafts[0] > 0.5


def test_ranks_launch_the_same_steps_ahead(ranks: RankPool) -> None:
    """Nobody tells them: each counts the requests that decode, 17 at most, and 16 are the border."""
    texts = [f"Tom has {i} apples. He buys 7 more." for i in range(20)]
    off = rank_cases.launch_ahead(ONE_RANK, texts, "off")
    first, second = ranks.run(rank_cases.launch_ahead, 2, 1, texts, "auto")
    assert first == second and first.tokens == off.tokens
    assert {is_ahead for _, is_ahead in off.launched} == {False}
    assert {count for count, is_ahead in first.launched if is_ahead} == {16, 17}
    assert {count < 16 for count, is_ahead in first.launched if not is_ahead} == {True, False}  # on their way up, too


@pytest.mark.parametrize(
    ("spoiled", "rank", "place"),
    [("model.layers.1.mlp.experts.down_proj", 1, "[0, 0, 5]"), ("model.layers.0.self_attn.w_uv", 0, "[0, 0, 5]")],
)
def test_all_ranks_name_the_number_that_one_of_them_holds(
    ranks: RankPool, spoiled: str, rank: int, place: str, tmp_path: Path
) -> None:
    values = tiny_dict()
    write_small(tmp_path, values, {n: t.bfloat16() for n, t in tiny_tensors(tiny_config(**values), mtp=False).items()})
    found = ranks.run(rank_cases.explain, 2, 2, tmp_path, PROMPTS[:1], spoiled, rank)
    assert len(set(found)) == 1
    assert f"of parameter {spoiled} 1 number is NaN or infinite, the first at {place} of" in found[0]
    assert f"on rank {rank}" in found[0]


@pytest.mark.parametrize("sizes", [(2,), pytest.param((1, 3, 17), marks=pytest.mark.soak)])
def test_kernels_on_two_ranks_give_what_the_reference_gives_on_one(
    ranks: RankPool, sizes: tuple[int, ...], tmp_path: Path
) -> None:
    """In steps of every column of the table of ops/gpu.py: a dense layer, and an MTP layer with experts."""
    values = tiny_dict(num_hidden_layers=1, num_nextn_predict_layers=1, n_routed_experts=4)
    write_small(tmp_path, values, {n: t.bfloat16() for n, t in tiny_tensors(tiny_config(**values)).items()})
    expected = rank_cases.run_steps(ONE_RANK, tmp_path, sizes, False)
    first, second = ranks.run(rank_cases.run_steps, 2, 2, tmp_path, sizes, True)
    for found, wanted in zip(first.hidden + first.logits, expected.hidden + expected.logits, strict=True):
        torch.testing.assert_close(found, wanted, rtol=2e-3, atol=5e-3)
    assert all(a.equal(b) for a, b in zip(first.selections, expected.selections, strict=True))
    for ours, theirs in zip(first, second, strict=True):
        assert all(a.equal(b) for a, b in zip(ours, theirs, strict=True))
