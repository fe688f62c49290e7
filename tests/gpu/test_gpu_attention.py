"""Gathered attention by hand for a Hopper against the reference and against the kernel that runs everywhere."""

import pytest
import torch
from paged_steps import Step

from saccade.kernels import PAGE, reference
from saccade.kernels.attention import sparse_hopper
from saccade.kernels.attention.sparse_prefill import ManyConfig, attend_in_parts, sparse_attention_of_many
from saccade.kernels.linear.head_gemm import multiply_heads

TRITON = ManyConfig(by_hand=False)
CLOSE = {"atol": 2e-4, "rtol": 1e-3}


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("tokens", "heads", "width", "topk", "context"),
    [
        (9, 16, 512, 2048, 8192), (16, 16, 512, 2051, 4096), (32, 8, 512, 2048, 8192), (48, 16, 512, 2048, 3000),
        (64, 16, 512, 2048, 8192), (128, 16, 512, 2048, 8192), (192, 5, 256, 100, 1024), (700, 16, 512, 2048, 4096),
        (24, 16, 64, 65, 512), (33, 1, 128, 1, 64),
    ],
)  # fmt: skip
def test_attention_by_hand(tokens: int, heads: int, width: int, topk: int, context: int) -> None:
    """Contexts of one position, of one tile and of all, with every number of parts; and the same bits four times."""
    lengths = [max(1, context - 211 * i % context) for i in range(tokens)]
    lengths[0], lengths[1], lengths[2] = context, 1, min(64, context)
    step = Step(lengths, [1] * tokens, context // PAGE + 1)
    q, pool = step.normal(tokens, heads, width + 64) / 8, step.latents(width, 64)
    positions = torch.arange(step.page_table.shape[1] * PAGE, device=q.device)
    hidden = positions > step.positions[:, None]
    logits = step.normal(tokens, len(positions)).masked_fill(hidden, float("-inf"))
    selection = reference.select(logits, step.positions, topk)
    selection[3] = -1  # nothing
    where = step.page_table, step.request, selection, 0.07, width
    assert sparse_hopper.is_taken_by_hand(q, pool, width)
    right = reference.sparse_attention(q, pool, *where)
    w_uv = step.normal(heads, 128, width, dtype=torch.bfloat16) / width**0.5
    values = torch.einsum("thc,hvc->thv", right, w_uv.float())
    for splits in (None, 1, 3, 8):
        if splits is not None and splits * tokens > 2048:
            continue
        how = ManyConfig(splits=splits)
        found = sparse_attention_of_many(q, pool, *where, how)
        torch.testing.assert_close(found, right, **CLOSE, equal_nan=True)
        other = sparse_attention_of_many(q, pool, *where, TRITON._replace(splits=splits))
        torch.testing.assert_close(found, other, atol=2e-6, rtol=2e-5, equal_nan=True)
        assert all(
            sparse_attention_of_many(q, pool, *where, how).nan_to_num().equal(found.nan_to_num()) for _ in range(3)
        )
        parts = attend_in_parts(q, pool, *where, how)
        product = multiply_heads(parts, w_uv.transpose(1, 2))
        torch.testing.assert_close(product, values, atol=1e-3, rtol=1e-3, equal_nan=True)
        assert multiply_heads(parts, w_uv.transpose(1, 2)).nan_to_num().equal(product.nan_to_num())


@pytest.mark.gpu
def test_shapes_that_the_kernel_does_not_take() -> None:
    step = Step([100] * 10, [1] * 10, 2)
    pool = step.latents(512, 64)
    for heads, latent, width in (
        (17, pool, 512), (16, step.latents(512, 64, coded=True), 512), (16, step.latents(1024, 64), 1024),
        (16, step.latents(32, 64), 32), (16, step.latents(512, 32), 512), (16, step.latents(512, 0), 512),
    ):  # fmt: skip
        q = step.normal(10, heads, latent.width)
        assert not sparse_hopper.is_taken_by_hand(q, latent, width)
