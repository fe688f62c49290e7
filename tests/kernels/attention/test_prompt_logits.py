"""Index scores of prompts whose queries are rounded, against reference.py."""

import pytest
import torch
from paged_steps import Step

from saccade.kernels import PAGE, reference
from saccade.kernels.indexer.logits import index_logits
from saccade.kernels.indexer.prompt_logits import PromptScoreConfig, can_score_prompts, score_prompt
from saccade.kernels.indexer.queries import write_index_queries
from saccade.kernels.types import IndexKeys

HEADS, DIM, ROPE = 16, 64, 32


def make_keys(step: Step, is_fp8: bool) -> IndexKeys:
    keys = step.normal(step.pages * PAGE, DIM)
    return IndexKeys(*reference.quantize_rows(keys)) if is_fp8 else IndexKeys(keys.bfloat16())


@pytest.mark.parametrize("is_interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_queries_are_rotated_and_rounded_as_the_reference_says(dtype: torch.dtype, is_interleaved: bool) -> None:
    """12 heads of 48 dimensions, which no program takes as they are."""
    step = Step([9], [9], 1)
    q, weights, rotation = step.normal(9, 12, 48), step.normal(9, 20)[:, 8:], step.rotation(32)
    q[3] *= 1e4
    turned = torch.cat([reference.rotate(q[..., :32], rotation, is_interleaved), q[..., 32:]], 2)
    found = write_index_queries(q, weights, rotation, is_interleaved, 0.3, dtype)
    if dtype == torch.bfloat16:
        assert found.numbers.equal(turned.bfloat16()) and found.weights.equal(weights * 0.3)
    else:
        codes, scales = reference.quantize_rows(turned)
        assert found.numbers.float().equal(codes.float()) and found.weights.equal(weights * scales * 0.3)


@pytest.mark.parametrize("is_fp8", [False, True])
def test_scores_of_prompts_are_the_reference_s(is_fp8: bool) -> None:
    """Tokens of several requests share programs; keys behind a token's own are not asked for."""
    step = Step([70, 5, 130, 9], [20, 5, 12, 1], 3)
    keys, rotation = make_keys(step, is_fp8), step.rotation(ROPE)
    q = write_index_queries(
        step.normal(step.count, HEADS, DIM), step.normal(step.count, HEADS), rotation, False, 0.1, keys.data.dtype
    )
    wanted = reference.index_logits(q.numbers, q.weights, keys.data, *step.where(), key_scales=keys.scales)
    seen = torch.arange(wanted.shape[1], device=wanted.device) <= step.positions[:, None]
    for config in (None, PromptScoreConfig(columns=64, chunk=64)):
        found = score_prompt(q, keys, *step.where(), config)
        torch.testing.assert_close(found[seen], wanted[seen], rtol=1e-5, atol=1e-5)
    few = index_logits(*q, keys.data, *step.where(), key_scales=keys.scales)
    torch.testing.assert_close(few[seen], wanted[seen], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("place", ["query", "key", "BF16 key"])
def test_a_number_that_is_not_finite_is_no_score_of_zero(place: str) -> None:
    """A key in FP8 says so by its scale (cache_rows.py), one in BF16 by itself."""
    step = Step([40], [40], 1)
    keys, queries = make_keys(step, place != "BF16 key"), step.normal(40, HEADS, DIM)
    row = step.page_table[0, 0] * PAGE + 7
    if place == "query":
        queries[9, 2, 5] = float("inf")
    else:
        (keys.data if keys.scales is None else keys.scales)[row] = float("nan")
    weights = torch.ones(40, HEADS, device=queries.device)
    q = write_index_queries(queries, weights, step.rotation(ROPE), False, 1.0, keys.data.dtype)
    found = score_prompt(q, keys, *step.where())
    bad = found[9, :10] if place == "query" else found[8:, 7]
    assert bad.isnan().all() and found[8, :6].isfinite().all() and found[12, 8:12].isfinite().all()


def test_shapes_that_no_program_takes_are_known() -> None:
    keys = IndexKeys(torch.zeros(PAGE, DIM, dtype=torch.bfloat16))
    assert (
        can_score_prompts(64, 128, 1, keys)
        and can_score_prompts(32, 128, 1, keys)
        and not can_score_prompts(32, 128, 4, keys)
    )
    assert not can_score_prompts(12, 128, 1, keys) and not can_score_prompts(16, 48, 1, keys)
    assert not can_score_prompts(64, 128, 1, IndexKeys(torch.zeros(PAGE, DIM)))
